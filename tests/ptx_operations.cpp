/* ptx_operations.cpp: what instructions of PTX do, as its ISA has it: each for all of a block's threads that come to it. */
#include <string.h>

#include <cfenv>
#include <cfloat>
#include <cmath>
#include <limits>
#include <map>
#include <type_traits>
#include <utility>

#include "ptx_machine.h"

namespace ptx {

namespace {

/* ---- memory ---- */

/* Notes that a thread touches the bytes, and says whether it may. Of what others do, a thread is ordered only with what its block did before the
 * last barrier: with nothing of other blocks, whose numbers are from `launch` on. Number `launch` itself stands for several blocks, and the one
 * behind the threads' for several of them. */
template <size_t BYTES, bool STORES> bool touch(const machine &m, cell *c, uint32_t launch, unsigned thread) {
  const uint32_t block = m.block_number, interval = m.interval_number, number = interval + thread, several = interval + m.count;
  uint32_t bad = 0;
  for (size_t i = 0; i < BYTES; i++) {
    uint32_t writer = c[i].writer, reader = c[i].reader;
    uint32_t others_wrote = (writer >= launch) & (writer < block), others_read = (reader >= launch) & (reader < block);
    uint32_t one_read = (reader < interval) | (reader == number);
    bad |= others_wrote | ((writer >= interval) & (writer != number));
    if (STORES) {
      bad |= others_read | !one_read;
      c[i].writer = number;
    } else {
      c[i].reader = others_read ? launch : one_read ? number : several;
    }
  }
  return !bad;
}

std::map<uint64_t, area> areas; /* of device memory that launches have touched */
uint32_t next_number = 1;

area *find_area(machine &m, uint64_t address, unsigned thread) {
  allocation found = m.of.find((const void *)address);
  if (!found.bytes) m.wrong("an access outside of every allocation", thread);
  auto at = areas.find(found.begin);
  if (at == areas.end()) {
    cell *cells = (cell *)calloc(found.bytes, sizeof(cell));
    if (!cells) fail("out of memory");
    at = areas.emplace(found.begin, area{found, {cells, free}}).first;
  }
  return &at->second;
}

/* The host's address of the bytes that a thread reads or writes. */
template <size_t BYTES, bool STORES, bool SHARED> char *reach(machine &m, uint64_t address, unsigned thread) {
  if (address % BYTES) m.wrong("an access that is not aligned", thread);
  if (SHARED) {
    uint64_t at = address - SHARED_BASE;
    if (at >= m.shared.size() || BYTES > m.shared.size() - at) m.wrong("an access outside of shared memory", thread);
    cell *c = &m.shared_cells[at];
    for (size_t i = 0; i < BYTES && !STORES; i++)
      if (c[i].writer < m.block_number) m.wrong("shared memory is read that has not been written", thread);
    if (!touch<BYTES, STORES>(m, c, m.block_number, thread)) m.wrong("a race in shared memory", thread);
    return &m.shared[at];
  }
  area *&recent = m.recent[(size_t)(m.now - m.code.code.data())];
  if (!recent || address - recent->of.begin >= recent->of.bytes) recent = find_area(m, address, thread);
  uint64_t at = address - recent->of.begin;
  if (BYTES > recent->of.bytes - at) m.wrong("an access beyond an allocation", thread);
  if (!touch<BYTES, STORES>(m, &recent->cells[at], m.launch_number, thread)) m.wrong("a race in global memory", thread);
  return (char *)address;
}

uint64_t address_of(const machine &m, const instruction &x, unsigned thread) {
  int slot = x.at[x.vector];
  return (x.address_bytes == 8 ? m.at<uint64_t>(slot)[thread] : m.at<uint32_t>(slot)[thread]) + (uint64_t)x.offset;
}

/* The elements of a vector in memory into registers: extended by their sign, or by zeros, where these are larger. */
void take_elements(machine &m, const instruction &x, const char *memory, unsigned thread) {
  int unused = 64 - 8 * x.element_bytes;
  for (int e = 0; e < x.vector; e++) {
    uint64_t bits = 0;
    memcpy(&bits, memory + e * x.element_bytes, x.element_bytes);
    if (x.is_signed) bits = (uint64_t)((int64_t)(bits << unused) >> unused);
    memcpy(m.at<char>(x.at[e]) + (size_t)thread * x.register_bytes, &bits, x.register_bytes);
  }
}

/* Operands: the elements' registers, then the address. */
template <size_t BYTES, bool STORES, bool SHARED> void access_memory(machine &m, const instruction &x) {
  for (unsigned i = m.first; i < m.last; i++) {
    if (!m.mask[i]) continue;
    char *memory = reach<BYTES, STORES, SHARED>(m, address_of(m, x, i), i);
    if (!STORES) take_elements(m, x, memory, i);
    for (int e = 0; e < x.vector && STORES; e++)
      memcpy(memory + e * x.element_bytes, m.at<char>(x.at[e]) + (size_t)i * x.register_bytes, x.element_bytes);
  }
}

void load_parameter(machine &m, const instruction &x) {
  for (unsigned i = m.first; i < m.last; i++)
    if (m.mask[i]) take_elements(m, x, m.of.parameters.data() + x.offset, i);
}

template <bool STORES, bool SHARED> handler *access_of(size_t bytes) {
  switch (bytes) {
  case 1:
    return access_memory<1, STORES, SHARED>;
  case 2:
    return access_memory<2, STORES, SHARED>;
  case 4:
    return access_memory<4, STORES, SHARED>;
  case 8:
    return access_memory<8, STORES, SHARED>;
  default:
    return access_memory<16, STORES, SHARED>;
  }
}

/* ---- each thread by itself ---- */

/* d = f(s...) */
template <class F, class D, class... S> void assign(const machine &m, const F &f, D *d, const S *...s) {
  const uint32_t *mask = m.mask.data();
  if (m.dense) {
#pragma GCC ivdep
    for (unsigned i = m.first; i < m.last; i++) d[i] = f(s[i]...);
  } else {
#pragma GCC ivdep
    for (unsigned i = m.first; i < m.last; i++) d[i] = mask[i] ? f(s[i]...) : d[i];
  }
}

/* By an F, which has no state, on the operands. */
template <class F, class D, class... S> void map(machine &m, const instruction &x) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    assign(m, F(), m.at<D>(x.at[0]), m.at<const S>(x.at[I + 1])...);
  }
  (std::index_sequence_for<S...>());
}

/* The same, rounded to minus infinity. */
template <handler *RUN> void downward(machine &m, const instruction &x) {
  fesetround(FE_DOWNWARD);
  RUN(m, x);
  fesetround(FE_TONEAREST);
}

template <class TO, class FROM> TO same_bits(FROM from) {
  static_assert(sizeof(TO) == sizeof(FROM), "the same size");
  TO to;
  memcpy(&to, &from, sizeof to);
  return to;
}

uint32_t to_bf16(float x) {
  uint32_t bits = same_bits<uint32_t>(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

template <class T> T flushed(T x) {
  return std::fabs(x) < FLT_MIN ? std::copysign((T)0, x) : x;
}

/* ---- warps ---- */

/* Operands: value, the predicate that tells whether the partner is in the warp, the value given, the lane's distance, 31, all lanes. */
void shuffle(machine &m, const instruction &x) {
  uint32_t *to = m.at<uint32_t>(x.at[0]), *from = m.at<uint32_t>(x.at[2]), *distance = m.at<uint32_t>(x.at[3]), given[WARP];
  for (unsigned w = m.first; w < m.last; w += WARP) {
    if (!m.mask[w]) continue;
    memcpy(given, from + w, sizeof given);
    for (unsigned i = 0; i < WARP; i++) {
      if (m.at<uint32_t>(x.at[4])[w + i] != WARP - 1 || m.at<uint32_t>(x.at[5])[w + i] != ~0u || distance[w + i] >= WARP)
        m.wrong("an exchange of other lanes than all", w + i);
      to[w + i] = given[i ^ distance[w + i]];
      m.at<predicate>(x.at[1])[w + i] = -1;
    }
  }
}

void ballot(machine &m, const instruction &x) {
  for (unsigned w = m.first; w < m.last; w += WARP) {
    if (!m.mask[w]) continue;
    uint32_t bits = 0;
    for (unsigned i = 0; i < WARP; i++) {
      if (m.at<uint32_t>(x.at[2])[w + i] != ~0u) m.wrong("a vote of other lanes than all", w + i);
      bits |= (uint32_t)(m.at<predicate>(x.at[1])[w + i] != 0) << i;
    }
    for (unsigned i = 0; i < WARP; i++) m.at<uint32_t>(x.at[0])[w + i] = bits;
  }
}

/* ldmatrix .m8n8.x4: lane 8 i + r has the address of row r of matrix i; lane l receives elements 2 (l % 4) and the next of row l / 4. Any lane may
 * read any row: who has written one is in a race with them, and is here taken for a reader of it like all. */
template <bool TRANSPOSED> void load_matrices(machine &m, const instruction &x) {
  for (unsigned w = m.first; w < m.last; w += WARP) {
    if (!m.mask[w]) continue;
    uint16_t element[4][8][8];
    for (unsigned i = 0; i < WARP; i++) {
      uint64_t address = address_of(m, x, w + i);
      const char *row = reach<16, false, true>(m, address, w + i);
      if (!touch<16, false>(m, &m.shared_cells[address - SHARED_BASE], m.block_number, m.count)) m.wrong("a race in shared memory", w + i);
      memcpy(element[i / 8][i % 8], row, 16);
    }
    for (unsigned i = 0; i < WARP; i++)
      for (unsigned n = 0; n < 4; n++) {
        unsigned r = i / 4, c = i % 4 * 2;
        uint32_t low = TRANSPOSED ? element[n][c][r] : element[n][r][c], high = TRANSPOSED ? element[n][c + 1][r] : element[n][r][c + 1];
        m.at<uint32_t>(x.at[n])[w + i] = low | high << 16;
      }
  }
}

float bf16_of(uint32_t bits, unsigned which) {
  return same_bits<float>(which ? bits & 0xffff0000u : bits << 16);
}

/* mma.m16n8k16, bf16: d = a b + c. Lane l's registers of a: rows l / 4, l / 4 + 8, of columns 2 (l % 4) and the next, then of those 8 further; of b:
 * these rows, then those 8 further, of column l / 4; of c and d: rows l / 4, l / 4 + 8, of columns 2 (l % 4) and the next. */
void multiply_matrices(machine &m, const instruction &x) {
  const int *d = x.at, *a = x.at + 4, *b = x.at + 8, *c = x.at + 10;
  for (unsigned w = m.first; w < m.last; w += WARP) {
    if (!m.mask[w]) continue;
    float left[16][16], right[16][8], sum[16][8] = {{0}};
    for (unsigned i = 0; i < WARP; i++)
      for (unsigned half = 0; half < 2; half++) {
        unsigned row = i / 4, pair = i % 4 * 2 + half;
        for (unsigned n = 0; n < 4; n++) left[row + n % 2 * 8][pair + n / 2 * 8] = bf16_of(m.at<uint32_t>(a[n])[w + i], half);
        for (unsigned n = 0; n < 2; n++) right[pair + n * 8][row] = bf16_of(m.at<uint32_t>(b[n])[w + i], half);
      }
    for (unsigned row = 0; row < 16; row++)
      for (unsigned k = 0; k < 16; k++)
        for (unsigned column = 0; column < 8; column++) sum[row][column] += left[row][k] * right[k][column];
    for (unsigned i = 0; i < WARP; i++)
      for (unsigned n = 0; n < 4; n++) m.at<float>(d[n])[w + i] = m.at<float>(c[n])[w + i] + sum[i / 4 + n / 2 * 8][i % 4 * 2 + n % 2];
  }
}

/* ---- the table ---- */

template <class F, class D, class... S> operation mapped_as(D (F::*)(S...) const) {
  return {map<F, D, S...>, {sizeof(D), sizeof(S)...}, flow::ON};
}

/* The types of a function, which has no state, are those of the operands. */
template <class F> operation mapped(F) {
  return mapped_as(&F::operator());
}

predicate said(bool what) {
  return -(predicate)what;
}

/* Whether a quotient is one more than the largest number. */
template <class T> bool overflows(T a, T b) {
  return std::is_signed_v<T> && b == (T)-1 && a == std::numeric_limits<T>::min();
}

/* Sums and products of a signed type wrap around. */
template <class T> void add_integers(operation_table &t, const std::string &type) {
  typedef std::make_unsigned_t<T> U;
  enum : uint32_t { BITS = 8 * sizeof(T) };
  t["add." + type] = mapped([](U a, U b) { return (U)(a + b); });
  t["sub." + type] = mapped([](U a, U b) { return (U)(a - b); });
  t["mul.lo." + type] = mapped([](U a, U b) { return (U)((uint64_t)a * b); });
  t["mad.lo." + type] = mapped([](U a, U b, U c) { return (U)((uint64_t)a * b + c); });
  t["neg." + type] = mapped([](U a) { return (U)(0 - a); });
  t["min." + type] = mapped([](T a, T b) { return b < a ? b : a; });
  t["max." + type] = mapped([](T a, T b) { return a < b ? b : a; });
  t["div." + type] = mapped([](T a, T b) { return b == 0 ? (T)-1 : overflows(a, b) ? a : (T)(a / b); }); /* by 0: unspecified */
  t["rem." + type] = mapped([](T a, T b) { return b == 0 ? a : overflows(a, b) ? (T)0 : (T)(a % b); });
  t["shr." + type] = mapped([](T a, uint32_t by) { return (T)(by < BITS ? a >> by : a >> (BITS - 1) >> 1); });
}

template <class T> void add_bits(operation_table &t, const std::string &type) {
  t["and." + type] = mapped([](T a, T b) { return (T)(a & b); });
  t["or." + type] = mapped([](T a, T b) { return (T)(a | b); });
  t["xor." + type] = mapped([](T a, T b) { return (T)(a ^ b); });
  t["not." + type] = mapped([](T a) { return (T)~a; });
  t["shl." + type] = mapped([](T a, uint32_t by) { return (T)(by < 8 * sizeof(T) ? a << by : 0); });
}

template <class T> void add_moves(operation_table &t, const std::string &type) {
  t["mov." + type] = mapped([](T a) { return a; });
  t["selp." + type] = mapped([](T a, T b, predicate p) { return p ? a : b; });
}

template <class T> void add_comparisons(operation_table &t, const std::string &type) {
  t["setp.eq." + type] = mapped([](T a, T b) { return said(a == b); });
  t["setp.ne." + type] = mapped([](T a, T b) { return said((a < b) | (b < a)); });
  t["setp.lt." + type] = mapped([](T a, T b) { return said(a < b); });
  t["setp.le." + type] = mapped([](T a, T b) { return said(a <= b); });
  t["setp.gt." + type] = mapped([](T a, T b) { return said(b < a); });
  t["setp.ge." + type] = mapped([](T a, T b) { return said(b <= a); });
}

/* The larger, or the smaller number; of a number and NaN the number; 0 is larger than -0. */
template <class T, bool LARGER> T extreme(T a, T b) {
  T of_equals = std::signbit(a) == LARGER ? b : a;
  return a != a ? b : b != b ? a : a == b ? of_equals : (b < a) == LARGER ? a : b;
}

/* Comparisons that end in u are true where one is NaN, too. */
template <class T> void add_reals(operation_table &t, const std::string &type) {
  add_moves<T>(t, type);
  add_comparisons<T>(t, type);
  t["setp.neu." + type] = mapped([](T a, T b) { return said(!(a == b)); });
  t["setp.ltu." + type] = mapped([](T a, T b) { return said(!(b <= a)); });
  t["setp.leu." + type] = mapped([](T a, T b) { return said(!(b < a)); });
  t["setp.gtu." + type] = mapped([](T a, T b) { return said(!(a <= b)); });
  t["setp.geu." + type] = mapped([](T a, T b) { return said(!(a < b)); });
  t["add." + type] = t["add.rn." + type] = mapped([](T a, T b) { return a + b; });
  t["sub." + type] = t["sub.rn." + type] = mapped([](T a, T b) { return a - b; });
  t["mul." + type] = t["mul.rn." + type] = mapped([](T a, T b) { return a * b; });
  t["div.rn." + type] = mapped([](T a, T b) { return a / b; });
  auto multiply_add = [](T a, T b, T c) { return std::fma(a, b, c); };
  t["fma.rn." + type] = t["fma.rm." + type] = mapped(multiply_add);
  t["fma.rm." + type].run = downward<map<decltype(multiply_add), T, T, T, T>>;
  t["neg." + type] = mapped([](T a) { return -a; });
  t["abs." + type] = mapped([](T a) { return std::fabs(a); });
  t["copysign." + type] = mapped([](T sign, T a) { return std::copysign(a, sign); });
  t["min." + type] = mapped([](T a, T b) { return extreme<T, false>(a, b); });
  t["max." + type] = mapped([](T a, T b) { return extreme<T, true>(a, b); });
  t["sqrt.rn." + type] = mapped([](T a) { return std::sqrt(a); });
  t["rcp.rn." + type] = mapped([](T a) { return 1 / a; });
  t["cvt.rni." + type + "." + type] = mapped([](T a) { return std::nearbyint(a); });
  t["cvt.rzi." + type + "." + type] = mapped([](T a) { return std::trunc(a); });
}

template <class T> void add_integer_type(operation_table &t, const std::string &bits) {
  typedef std::make_unsigned_t<T> U;
  const std::string s = "s" + bits, u = "u" + bits, b = "b" + bits;
  add_integers<T>(t, s), add_integers<U>(t, u);
  add_comparisons<T>(t, s), add_comparisons<U>(t, u), add_comparisons<U>(t, b);
  add_moves<U>(t, s), add_moves<U>(t, u), add_moves<U>(t, b);
  add_bits<U>(t, b);
}

/* NaN: 0 */
uint32_t to_unsigned(float a) {
  int64_t whole = a > 0 && a < 0x1p32f ? (int64_t)a : 0;
  return a >= 0x1p32f ? UINT32_MAX : (uint32_t)whole;
}

void add_conversions(operation_table &t) {
  t["cvt.u16.u32"] = mapped([](uint32_t a) { return (uint16_t)a; });
  t["cvt.u32.u16"] = mapped([](uint16_t a) { return (uint32_t)a; });
  t["cvt.u32.u64"] = mapped([](uint64_t a) { return (uint32_t)a; });
  t["cvt.u64.u32"] = mapped([](uint32_t a) { return (uint64_t)a; });
  t["cvt.s64.s32"] = mapped([](int32_t a) { return (int64_t)a; });
  t["cvt.rn.f32.u16"] = mapped([](uint16_t a) { return (float)a; });
  t["cvt.rn.f32.s32"] = mapped([](int32_t a) { return (float)a; });
  t["cvt.rn.f32.s64"] = mapped([](int64_t a) { return (float)a; });
  t["cvt.rn.f32.f64"] = mapped([](double a) { return (float)a; });
  t["cvt.f64.f32"] = mapped([](float a) { return (double)a; });
  t["cvt.rn.f64.s32"] = mapped([](int32_t a) { return (double)a; });
  t["cvt.rn.f64.s64"] = mapped([](int64_t a) { return (double)a; });
  t["cvt.rzi.u32.f32"] = mapped([](float a) { return to_unsigned(a); });
  t["cvt.sat.f32.f32"] = mapped([](float a) { return 1 < a ? 1.0f : 0 < a ? a : 0.0f; });
  t["cvt.rn.bf16x2.f32"] = mapped([](float high, float low) { return to_bf16(high) << 16 | to_bf16(low); });
}

operation_table all_operations() {
  operation_table t;
  add_integer_type<int16_t>(t, "16");
  add_integer_type<int32_t>(t, "32");
  add_integer_type<int64_t>(t, "64");
  add_reals<float>(t, "f32");
  add_reals<double>(t, "f64");
  add_bits<uint32_t>(t, "pred");
  add_moves<uint32_t>(t, "pred");
  add_conversions(t);
  t["cvta.to.global.u64"] = t["mov.u64"];
  t["high half"] = mapped([](uint64_t a) { return (uint32_t)(a >> 32); }); /* mov.b64 from and to two registers */
  t["two halves"] = mapped([](uint32_t low, uint32_t high) { return low | (uint64_t)high << 32; });
  t["popc.b32"] = mapped([](uint32_t a) { return (uint32_t)__builtin_popcount(a); });
  t["mul.wide.u16"] = mapped([](uint16_t a, uint16_t b) { return (uint32_t)a * b; });
  t["mul.wide.u32"] = mapped([](uint32_t a, uint32_t b) { return (uint64_t)a * b; });
  t["mul.wide.s32"] = mapped([](int32_t a, int32_t b) { return (int64_t)a * b; });
  t["mul.hi.s32"] = mapped([](int32_t a, int32_t b) { return (int32_t)((int64_t)a * b >> 32); });
  t["mul.hi.u64"] = mapped([](uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); });
  t["ex2.approx.ftz.f32"] = mapped([](float a) { return flushed(std::exp2(flushed(a))); });
  t["rcp.approx.ftz.f32"] = mapped([](float a) { return flushed(1 / flushed(a)); });
  t["rcp.approx.ftz.f64"] = mapped([](double a) { return same_bits<double>(same_bits<uint64_t>(1 / a) & ~(uint64_t)UINT32_MAX); });
  t["bra"] = t["bra.uni"] = {NULL, {}, flow::BRANCH};
  t["ret"] = {NULL, {}, flow::RETURN};
  t["bar.sync"] = {NULL, {}, flow::BARRIER};
  t["shfl.sync.bfly.b32"] = {shuffle, std::vector<size_t>(6, 4), flow::TOGETHER};
  t["vote.sync.ballot.b32"] = {ballot, std::vector<size_t>(3, 4), flow::TOGETHER};
  t["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {multiply_matrices, std::vector<size_t>(14, 4), flow::TOGETHER};
  return t;
}

} // namespace

const operation_table &operations() {
  static const operation_table table = all_operations();
  return table;
}

handler *memory_operation(const std::string &name, size_t bytes) {
  const std::string space = name.substr(0, 9);
  return space == "ld.param."                                       ? load_parameter
         : space == "ld.shared"                                     ? access_of<false, true>(bytes)
         : space == "st.shared"                                     ? access_of<true, true>(bytes)
         : space == "ld.global"                                     ? access_of<false, false>(bytes)
         : space == "st.global"                                     ? access_of<true, false>(bytes)
         : name == "ldmatrix.sync.aligned.m8n8.x4.shared.b16"       ? load_matrices<false>
         : name == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" ? load_matrices<true>
                                                                    : NULL;
}

void forget_touches(const launch &l) {
  for (auto a = areas.begin(); a != areas.end();) {
    allocation now = l.find((const void *)a->first);
    a = now.begin == a->first && now.bytes == a->second.of.bytes ? std::next(a) : areas.erase(a);
  }
  if (next_number < UINT32_MAX / 2) return;
  areas.clear();
  next_number = 1;
}

uint32_t take_numbers(uint32_t count) {
  if (next_number > UINT32_MAX - count) fail("a launch of too many blocks");
  next_number += count;
  return next_number - count;
}

} // namespace ptx
