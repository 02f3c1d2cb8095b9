/* ptx_rules.cpp: the interpreter of PTX (ptx.h) on small kernels: what instructions compute, and that what a device would not forgive ends the
 * program. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <deque>

#include "ptx.h"

extern "C" {
#include <cmocka.h> /* last: it has a macro named fail */
}

namespace {

alignas(256) uint32_t memory[1024];

ptx::allocation find_memory(const void *at) {
  if (at < (void *)memory || at >= (void *)(memory + 1024)) return {0, 0};
  return {(uint64_t)memory, sizeof memory};
}

/* A kernel of `body`: %r1 is the thread, %r2 the block, %r3 the address of its 4 of 512 bytes of shared memory, %rd1 memory's address, %rd2
 * the address of the thread's 4 bytes there. */
const ptx::kernel &made(const std::string &body) {
  static std::deque<std::string> texts; /* stay */
  const std::string name = "k" + std::to_string(texts.size());
  texts.push_back(".version 9.0\n.shared .align 16 .b8 s[512];\n.entry " + name + "(\n.param .u64 p\n)\n{\n" +
                  ".reg .pred %p<9>;\n.reg .b32 %r<99>;\n.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n" +
                  "ld.param.u64 %rd1, [p];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmul.wide.u32 %rd2, %r1, 4;\n" +
                  "add.s64 %rd2, %rd1, %rd2;\nmov.u32 %r3, s;\nshl.b32 %r4, %r1, 2;\nadd.s32 %r3, %r3, %r4;\n" + body + "\nret;\n}\n");
  ptx::load(texts.back().c_str());
  return ptx::find(name.c_str());
}

void run(const std::string &body, unsigned blocks = 1, unsigned threads = 64) {
  const void *parameter = memory;
  ptx::launch l = {&made(body), blocks, 1, threads, 0, false, std::vector<char>(sizeof parameter), find_memory};
  memcpy(l.parameters.data(), &parameter, sizeof parameter);
  ptx::run(l);
}

/* ---- what is forbidden ---- */

/* Runs it in a process of its own, which has to end with a line that has `message`; NULL: to run through. */
void check_end(const char *message, const std::string &body, unsigned blocks = 1) {
  char said[4096] = "";
  int pipes[2], status = 0;
  assert_int_equal(pipe(pipes), 0);
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    dup2(pipes[1], STDERR_FILENO);
    run(body, blocks);
    _exit(0);
  }
  close(pipes[1]);
  for (ssize_t got, at = 0; (got = read(pipes[0], said + at, sizeof said - 1 - (size_t)at)) > 0;) at += got;
  close(pipes[0]);
  assert_int_equal(waitpid(child, &status, 0), child);
  bool as_wanted = message ? WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && strstr(said, message) : status == 0;
  if (!as_wanted) fail_msg("%s: status %d, not \"%s\", but: %s", body.c_str(), status, message ? message : "", said);
}

const std::string NEIGHBOUR = "xor.b32 %r5, %r3, 4;", FIRST = "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra $end;",
                  LOWER = "setp.lt.u32 %p1, %r1, 32;\n",
                  SHUFFLE = "mov.u32 %r7, 1; mov.u32 %r8, 31; mov.u32 %r9, -1;\n"
                            "shfl.sync.bfly.b32 %r6|%p2, %r1, %r7, %r8, %r9;\n";

void memory_is_what_is_allocated(void **) {
  check_end(NULL, "ld.global.u32 %r5, [%rd2+3840];");
  check_end("outside of every allocation", "ld.global.u32 %r5, [%rd2+3844];");
  check_end("outside of every allocation", "st.global.u32 [%rd2+-4], %r1;");
  check_end("not aligned", "ld.global.u32 %r5, [%rd2+2];");
  check_end("not aligned", "st.global.v4.u32 [%rd2], {%r1, %r1, %r1, %r1};");
  check_end("outside of shared memory", "st.shared.u32 [%r3+260], %r1;");
  check_end("not aligned", "st.shared.u32 [%r3+1], %r1;");
  check_end("has not been written", "ld.shared.u32 %r5, [%r3];");
}

void barriers_part_who_shares_memory(void **) {
  check_end("race in shared", NEIGHBOUR + "st.shared.u32 [%r3], %r1; ld.shared.u32 %r6, [%r5];");
  check_end(NULL, NEIGHBOUR + "st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r6, [%r5];");
  check_end("race in shared", NEIGHBOUR + "st.shared.u32 [%r3], %r1; bar.sync 0; ld.shared.u32 %r6, [%r5]; st.shared.u32 [%r3], %r1;");
  check_end("race in shared", "mov.u32 %r5, s; st.shared.u32 [%r5], %r1;");
  check_end("race in global", "st.global.u32 [%rd1], %r1;");
  check_end("race in global", "ld.global.u32 %r5, [%rd1]; st.global.u32 [%rd2], %r1;");
  check_end(NULL, "ld.global.u32 %r5, [%rd1]; bar.sync 0; st.global.u32 [%rd2], %r1;");
  check_end(NULL, FIRST + "st.global.u32 [%rd1], %r2;\n$end:");
  check_end("race in global", FIRST + "st.global.u32 [%rd1], %r2;\n$end:", 2);
  check_end(NULL, "ld.global.u32 %r5, [%rd1];", 3);
  check_end(
      "race in global",
      "ld.global.u32 %r5, [%rd1]; bar.sync 0; setp.ne.s32 %p2, %r2, 2; @%p2 bra $end;\n" + FIRST + "st.global.u32 [%rd1], %r2;\n$end:", 3);
}

void all_come_to_what_is_done_together(void **) {
  check_end("not all threads reach", LOWER + "@%p1 bra $end; bar.sync 0;\n$end:");
  check_end("two barriers", LOWER + "@%p1 bra $a; bar.sync 0; bra $end;\n$a: bar.sync 0;\n$end:");
  check_end(NULL, LOWER + "@%p1 bra $end;" + SHUFFLE + "$end:");
  check_end("a part of one does not reach", FIRST + SHUFFLE + "$end:");
  check_end("other lanes than all", "mov.u32 %r7, 1; mov.u32 %r8, 31; mov.u32 %r9, 1; shfl.sync.bfly.b32 %r6|%p2, %r1, %r7, %r8, %r9;");
  check_end("not known", "sin.approx.f32 %f1, %f2;");
}

/* ---- what is computed ---- */

/* One thread's value, in %r5 at the end. */
void check_value(const char *body, uint32_t want) {
  run(std::string(body) + "st.global.u32 [%rd2], %r5;");
  if (memory[0] != want || memory[63] != want) fail_msg("%s: 0x%08x, not 0x%08x", body, memory[0], want);
}

void values_are_those_of_the_manual(void **) {
  check_value("fma.rm.f32 %f1, 0f3F800000, 0f3F800000, 0fB0800000; mov.b32 %r5, %f1;", 0x3f7fffff);
  check_value("fma.rn.f32 %f1, 0f3F800000, 0f3F800000, 0fB0800000; mov.b32 %r5, %f1;", 0x3f800000);
  check_value("fma.rn.f32 %f1, 0f3F800001, 0f3F800001, 0fBF800002; mov.b32 %r5, %f1;", 0x28800000); /* 2^-46: rounded once */
  check_value("mul.f32 %f1, 0f00000001, 0f3F400000; mov.b32 %r5, %f1;", 1);                         /* subnormal */
  check_value("cvt.rn.bf16x2.f32 %r5, 0f7F800001, 0fFFC00000;", 0x7fff7fff);
  check_value("cvt.rn.bf16x2.f32 %r5, 0f3F808000, 0f3F818000;", 0x3f803f82);
  check_value("cvt.rn.bf16x2.f32 %r5, 0f7F7FFFFF, 0fFF800000;", 0x7f80ff80);
  check_value("min.f32 %f1, 0f00000000, 0f80000000; mov.b32 %r5, %f1;", 0x80000000);
  check_value("max.f32 %f1, 0f80000000, 0f00000000; mov.b32 %r5, %f1;", 0);
  check_value("max.f32 %f1, 0f7FC00000, 0fBF800000; mov.b32 %r5, %f1;", 0xbf800000);
  check_value("cvt.rni.f32.f32 %f1, 0f40200000; mov.b32 %r5, %f1;", 0x40000000);
  check_value("cvt.sat.f32.f32 %f1, 0f7FC00000; mov.b32 %r5, %f1;", 0);
  check_value("cvt.rzi.u32.f32 %r5, 0fBF800000;", 0);
  check_value("cvt.rzi.u32.f32 %r5, 0f60000000;", UINT32_MAX);
  check_value("cvt.rzi.u32.f32 %r5, 0f4F000000;", 0x80000000);
  check_value("setp.gtu.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r5, 7, 8, %p1;", 7);
  check_value("setp.gt.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r5, 7, 8, %p1;", 8);
  check_value("setp.lt.u32 %p1, -1, 1; selp.b32 %r5, 7, 8, %p1;", 8);
  check_value("shl.b32 %r5, 1, 32;", 0);
  check_value("shr.s32 %r5, -9, 40;", UINT32_MAX);
  check_value("shr.u32 %r5, -9, 40;", 0);
  check_value("div.s32 %r5, -7, 2;", (uint32_t)-3);
  check_value("rem.s32 %r5, -7, 2;", (uint32_t)-1);
  check_value("mul.hi.u64 %rd3, -1, 3; cvt.u32.u64 %r5, %rd3;", 2);
  check_value("mul.hi.s32 %r5, -1, 3;", UINT32_MAX);
  check_value("mul.wide.s32 %rd3, -3, 5; mov.b64 {%r6, %r5}, %rd3;", UINT32_MAX);
  check_value("ex2.approx.ftz.f32 %f1, 0fC3000000; mov.b32 %r5, %f1;", 0); /* 2^-128 is subnormal */
}

/* Threads that go round a loop a different number of times meet behind it. */
void threads_part_and_meet(void **) {
  run("mov.u32 %r5, 0; mov.u32 %r6, %r1;\n$loop: add.s32 %r5, %r5, %r6; setp.eq.s32 %p1, %r6, 0;\n@%p1 bra $out; sub.s32 %r6, %r6, 1;\n"
      "bra $loop;\n$out: mov.u32 %r7, 2; mov.u32 %r8, 31; mov.u32 %r9, -1; shfl.sync.bfly.b32 %r10|%p2, %r5, %r7, %r8, %r9;\n"
      "setp.gt.u32 %p3, %r1, 9; vote.sync.ballot.b32 %r11, %p3, %r9;\n@!%p3 add.s32 %r10, %r10, %r11; st.global.u32 [%rd2], %r10;");
  for (uint32_t i = 0; i < 64; i++) assert_int_equal(memory[i], (i ^ 2) * ((i ^ 2) + 1) / 2 + (i > 9 ? 0 : 0xfffffc00));
}

/* Four matrices lie one behind the other; lane l has the address of row l. An element is its number: of row r and column c of matrix n 64 n + 8 r + c.
 * Thread t receives of row t / 4 columns 2 (t % 4) and the next. */
void matrices_are_loaded(void **) {
  for (int turned = 0; turned < 2; turned++) {
    for (uint32_t i = 0; i < 128; i++) memory[i] = 2 * i | (2 * i + 1) << 16;
    run(std::string("mul.wide.u32 %rd3, %r1, 16; add.s64 %rd3, %rd1, %rd3; ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd3];\n"
                    "shl.b32 %r5, %r1, 4; mov.u32 %r6, s; add.s32 %r5, %r5, %r6; st.shared.v4.u32 [%r5], {%r10, %r11, %r12, %r13};\n"
                    "bar.sync 0; ldmatrix.sync.aligned.m8n8.x4.") +
            (turned ? "trans." : "") + "shared.b16 {%r20, %r21, %r22, %r23}, [%r5]; st.global.v4.u32 [%rd3], {%r20, %r21, %r22, %r23};",
        1, 32);
    for (uint32_t t = 0; t < 32; t++)
      for (uint32_t n = 0; n < 4; n++) {
        uint32_t row = t / 4, column = t % 4 * 2, first = 64 * n + (turned ? 8 * column + row : 8 * row + column);
        assert_int_equal(memory[4 * t + n], first | (first + (turned ? 8 : 1)) << 16);
      }
  }
  check_end("race in shared", "shl.b32 %r5, %r1, 4; mov.u32 %r6, s; add.s32 %r5, %r5, %r6;\n" + LOWER +
                                  "@!%p1 bra $end; st.shared.v4.u32 [%r5], {%r1, %r1, %r1, %r1};\n"
                                  "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r5];\n$end:");
}

/* Of a[16, 16], b[16, 8], c[16, 8]: integers, so that sums are exact. */
float a_at(int row, int k) {
  return (float)((row * 3 + k * 5) % 7 - 3);
}
float b_at(int k, int column) {
  return (float)((k + column * 2) % 5 - 2);
}
float c_at(int row, int column) {
  return (float)(row * 2 - column);
}

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

/* As the manual numbers a thread's elements i of each matrix: by its group, four threads, and its number in it. */
void matrices_are_multiplied(void **) {
  for (int t = 0; t < 32; t++) {
    int group = t >> 2, in_group = t % 4;
    uint32_t *own = memory + 16 * t;
    memset(own, 0, 16 * sizeof *own);
    for (int i = 0; i < 8; i++) {
      int row = i < 2 || (4 <= i && i < 6) ? group : group + 8, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      own[i / 2] |= bits_of(a_at(row, column)) >> 16 << i % 2 * 16;
    }
    for (int i = 0; i < 4; i++) own[4 + i / 2] |= bits_of(b_at(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group)) >> 16 << i % 2 * 16;
    for (int i = 0; i < 4; i++) own[8 + i] = bits_of(c_at(i < 2 ? group : group + 8, in_group * 2 + (i & 1)));
  }
  run("mul.wide.u32 %rd3, %r1, 64; add.s64 %rd3, %rd1, %rd3; ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd3];\n"
      "ld.global.v2.u32 {%r14, %r15}, [%rd3+16]; ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd3+32];\n"
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f5, %f6, %f7, %f8}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f1, %f2, %f3, "
      "%f4};\nst.global.v4.f32 [%rd3+32], {%f5, %f6, %f7, %f8};",
      1, 32);
  for (int t = 0; t < 32; t++)
    for (int i = 0; i < 4; i++) {
      int row = i < 2 ? t >> 2 : (t >> 2) + 8, column = t % 4 * 2 + (i & 1);
      float want = c_at(row, column);
      for (int k = 0; k < 16; k++) want += a_at(row, k) * b_at(k, column);
      assert_int_equal(memory[16 * t + 8 + i], bits_of(want));
    }
}

} // namespace

int main() {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(memory_is_what_is_allocated),
      cmocka_unit_test(barriers_part_who_shares_memory),
      cmocka_unit_test(all_come_to_what_is_done_together),
      cmocka_unit_test(values_are_those_of_the_manual),
      cmocka_unit_test(threads_part_and_meet),
      cmocka_unit_test(matrices_are_loaded),
      cmocka_unit_test(matrices_are_multiplied),
  };
  if (!ptx::usable()) {
    puts("skipped: this CPU has no AVX2");
    return 77;
  }
  return cmocka_run_group_tests(tests, NULL, NULL);
}
