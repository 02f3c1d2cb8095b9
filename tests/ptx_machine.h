/* ptx_machine.h: what a kernel is decoded to, and a launch as it runs: between ptx.cpp, which decodes and runs, and ptx_operations.cpp, which knows
 * what instructions do. */
#ifndef OMNIQUANT_PTX_MACHINE_H
#define OMNIQUANT_PTX_MACHINE_H

#include <stdlib.h>

#include <unordered_map>

#include "ptx.h"

namespace ptx {

enum : unsigned { WARP = 32, MOST_OPERANDS = 14, SHARED_BASE = 1024 /* no address of shared memory is NULL */ };

typedef int32_t predicate; /* -1: true */

struct machine;
struct instruction;
typedef void handler(machine &m, const instruction &x);

enum class flow : uint8_t { ON, BRANCH, RETURN, BARRIER, TOGETHER /* whole warps */ };

struct instruction {
  handler *run = NULL;
  enum flow flow = flow::ON;
  bool negated = false;                   /* the guard */
  bool stores = false, is_signed = false; /* an access; its elements */
  uint8_t vector = 1;                     /* its elements */
  uint8_t element_bytes = 0;              /* of each in memory */
  uint8_t register_bytes = 0, address_bytes = 0;
  int guard = -1; /* predicate; -1: none */
  int at[MOST_OPERANDS] = {0};
  int64_t offset = 0; /* of an access */
  size_t target = 0;  /* of a branch */
  int file = 0, line = 0;
};

struct constant {
  int at;
  size_t bytes;
  uint64_t value;
};

/* What a thread is told: at slots in this order. */
const char *const PLACES[] = {"%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y"};
enum place { TID_X, NTID_X, CTAID_X, CTAID_Y, NCTAID_X, NCTAID_Y, PLACE_COUNT };

struct program {
  std::vector<instruction> code;
  std::vector<constant> constants;
  int slot_bytes = PLACE_COUNT * 4; /* of all registers, for one thread */
};

/* Says what is wrong and ends the program. */
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);

/* Who touched a byte last. Threads have other numbers in each launch, block, and interval between barriers, larger than all before. */
struct cell {
  uint32_t writer, reader;
};

struct area {
  allocation of;
  std::unique_ptr<cell[], decltype(&free)> cells;
};

struct machine {
  const launch &of;
  const program &code;
  const unsigned count; /* threads of a block */
  char *const file;     /* registers: slot s from s * count on */
  const instruction *now = NULL;
  unsigned block = 0;
  /* The threads that now's effect is for: those of mask in [first, last), where dense all of them. */
  std::vector<uint32_t> mask;
  unsigned first = 0, last = 0;
  bool dense = false;
  std::vector<uint32_t> pc, active, halted; /* by thread; mask before a guard; halted: waits for a barrier or its warp */
  size_t begin = 0, limit = 0;              /* where they are, and where the next of the others is */
  std::vector<area *> recent;               /* what an instruction touched last */
  std::vector<char> shared;
  std::vector<cell> shared_cells;
  uint32_t launch_number, block_number = 0, interval_number = 0; /* threads' numbers begin there in the launch, the block, the interval */

  machine(const launch &l, char *registers);
  template <class T> T *at(int slot) const {
    return (T *)(void *)(file + (size_t)slot * count);
  }
  [[noreturn]] void wrong(const char *what, unsigned thread) const;
};

/* Forgets memory that has been freed since the launch before; and all who touched memory, where numbers come to an end. */
void forget_touches(const launch &l);

/* The first of that many numbers, larger than all before. */
uint32_t take_numbers(uint32_t count);

struct operation {
  handler *run;
  std::vector<size_t> bytes; /* of each operand, a register */
  enum flow flow;
};

typedef std::unordered_map<std::string, operation> operation_table;

/* By their names. */
const operation_table &operations();

/* What does ld, st and ldmatrix, of so many bytes at once; NULL: not known. */
handler *memory_operation(const std::string &name, size_t bytes);

} // namespace ptx

#endif
