/* ptx.h: runs the PTX that nvcc makes, for tests of kernels where there is no device. What is known is what our kernels are compiled to.
 *
 * Blocks run one after the other, a block's threads in lockstep: those with the lowest program counter go on, in one loop over them an
 * instruction. So a kernel is not tested by its timing but by its rules; a launch ends the program where a device might do otherwise:
 *   - an access that is not aligned to its size, or not inside one allocation or the block's shared memory;
 *   - shared memory that is read before the block has written it;
 *   - two threads at the same byte, one of them writing, without a barrier between, also in one warp; in global memory two blocks of a launch;
 *   - an exchange of a warp, ldmatrix or mma.sync with a part of it, and a barrier that not all threads of the block reach.
 * fp32 and fp64 are rounded as PTX says. Its approximations (ex2.approx, rcp.approx) are the host's exact functions, and the sums inside of
 * mma.sync, whose order PTX leaves open, are added up in fp32 one after the other. Which NaN a NaN is follows the host but for cvt to bf16. */
#ifndef OMNIQUANT_PTX_H
#define OMNIQUANT_PTX_H

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

namespace ptx {

/* A piece of device memory. */
struct allocation {
  uint64_t begin;
  size_t bytes; /* 0: none */
};

/* A kernel's parameter among the bytes of all. */
struct parameter {
  size_t at, bytes;
};

struct program;

struct kernel {
  std::string name;
  std::vector<parameter> parameters;
  size_t shared_bytes = 0; /* its own */
  unsigned most_threads = 1024;
  std::shared_ptr<const program> code;
};

struct launch {
  const kernel *of;
  unsigned blocks_x, blocks_y, threads; /* threads a block: a multiple of 32 */
  size_t shared_bytes;                  /* that the launch asks for, behind the kernel's own */
  bool reversed;                        /* the last block first */
  std::vector<char> parameters;
  allocation (*find)(const void *memory); /* the device memory that an address is in */
};

/* Whether the CPU has what this is compiled for. */
bool usable();

/* Takes a module's text, which has to stay. */
void load(const char *text);

/* A kernel of the modules by its mangled name. Ends the program where there is none, or it has what is not known. */
const kernel &find(const char *name);

/* All of it, until the end. */
void run(const launch &l);

} // namespace ptx

#endif
