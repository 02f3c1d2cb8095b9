/* ptx.cpp: an interpreter of PTX. A kernel is decoded once, its calls put in their places; a register is an array with a value for each thread of
 * a block, and so are constants and what a thread is told of its place. */
#include "ptx.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <utility>

#include "ptx_machine.h"

namespace ptx {

namespace {

/* Of shared memory, or a parameter. */
struct variable {
  std::string name;
  size_t align, bytes; /* 0 bytes: as many as a launch asks for */
};

/* What the text declares. */
std::unordered_map<std::string, const char *> functions; /* where the text goes on behind the name */
std::unordered_map<std::string, variable> shared_variables;
std::unordered_map<int, std::string> files; /* of the sources, by number */

std::unordered_map<std::string, kernel> kernels;

} // namespace

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("ptx: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  abort();
}

void machine::wrong(const char *what, unsigned thread) const {
  fail("%s: thread %u of block %u in %s, at %s:%d", what, thread, block, of.of->name.c_str(), files[now->file].c_str(), now->line);
}

namespace {

/* ---- decoding ---- */

typedef std::vector<std::string> words;

/* The words of a statement: what an address has in brackets is one. */
words words_of(const std::string &statement) {
  words all;
  size_t at = 0;
  const char *const BETWEEN = " \t\n,{}()|;\"";
  while ((at = statement.find_first_not_of(BETWEEN, at)) != std::string::npos) {
    size_t end = statement.find_first_of(BETWEEN, at);
    all.push_back(statement.substr(at, end - at));
    at = end == std::string::npos ? statement.size() : end;
  }
  return all;
}

std::string text_of(const words &w) {
  std::string text;
  for (const std::string &word : w) text += (text.empty() ? "" : " ") + word;
  return text;
}

/* "[name+4]" */
std::string name_of(const std::string &address, int64_t *offset) {
  size_t plus = address.find('+');
  *offset = plus == std::string::npos ? 0 : strtoll(address.c_str() + plus + 1, NULL, 10);
  return address.substr(1, (plus == std::string::npos ? address.size() - 1 : plus) - 1);
}

size_t number(const char *digits) {
  return strtoul(digits, NULL, 10);
}

size_t bytes_of(const std::string &type) { /* ".u32", "f64", ".pred" */
  size_t digit = type.find_first_of("0123456789");
  return digit == std::string::npos ? sizeof(predicate) : number(&type[digit]) / 8;
}

/* ".align 8 .b8 name[24]", ".u64 name"; i is left behind it. */
variable declared(const words &w, size_t &i) {
  size_t align = 0;
  if (w.at(i) == ".align") align = number(w.at(i + 1).c_str()), i += 2;
  variable v = {w.at(i + 1), align, bytes_of(w.at(i))};
  i += 2;
  if (!align) v.align = v.bytes;
  size_t bracket = v.name.find('[');
  if (bracket == std::string::npos) return v;
  v.bytes *= number(&v.name[bracket + 1]);
  v.name.resize(bracket);
  return v;
}

size_t aligned_up(size_t at, size_t align) {
  return (at + align - 1) / align * align;
}

/* Past white space and comments. */
const char *skipped(const char *at) {
  for (;;) {
    at += strspn(at, " \t\r\n");
    if (strncmp(at, "//", 2) != 0) return at;
    at += strcspn(at, "\n");
  }
}

/* Text up to one of `ends`, without comments; `at` is left there. */
std::string taken(const char *&at, const char *ends) {
  std::string text;
  while (*at && !strchr(ends, *at)) {
    if (strncmp(at, "//", 2) == 0) at += strcspn(at, "\n");
    text += *at++;
  }
  return text;
}

/* Where names belong: the kernel, or one of its calls. */
struct scope {
  std::string prefix;                              /* makes names its own */
  std::unordered_map<std::string, int> parameters; /* of a call: slots */
};

struct decoder {
  kernel &k;
  program &p;
  std::unordered_map<std::string, size_t> parameters; /* of the kernel: where they lie */
  std::unordered_map<std::string, int> slots;
  std::unordered_map<std::string, size_t> register_bytes; /* by what a name begins with */
  std::unordered_map<std::string, uint64_t> shared;       /* addresses */
  std::unordered_map<std::string, size_t> labels;
  std::vector<std::pair<size_t, std::string>> branches;
  std::vector<size_t> dynamic; /* constants: the address of the memory that launches ask for */
  int calls = 0, file = 0, line = 0;

  [[noreturn]] void unknown(const std::string &what) const {
    fail("%s: %s is not known", k.name.c_str(), what.c_str());
  }
  void head(const char *at);
  void body(const char *at, const scope &s);
  void directive(const char *&at);
  void statement(const std::string &text, const scope &s);
  void plain(instruction x, const words &w, const scope &s);
  void access(instruction x, const words &w, const scope &s);
  void pass(instruction x, const std::string &name, const std::string &other, const scope &s);
  void call(const words &w, const scope &s);
  void place(const variable &v);
  int slot(const std::string &name, size_t bytes);
  int operand(const std::string &word, size_t bytes, const scope &s);
  uint64_t value(const std::string &word);
  size_t size(const std::string &name) const;
};

void decoder::place(const variable &v) {
  k.shared_bytes = aligned_up(k.shared_bytes, v.align);
  shared[v.name] = SHARED_BASE + k.shared_bytes;
  k.shared_bytes += v.bytes;
}

int decoder::slot(const std::string &name, size_t bytes) {
  auto found = slots.find(name);
  if (found != slots.end()) return found->second;
  int at = (int)aligned_up((size_t)p.slot_bytes, bytes);
  p.slot_bytes = at + (int)bytes;
  return slots[name] = at;
}

size_t decoder::size(const std::string &name) const {
  auto found = register_bytes.find(name.substr(0, name.find_last_not_of("0123456789") + 1));
  if (found == register_bytes.end()) unknown(name);
  return found->second;
}

/* Of a number, or the address of shared memory. */
uint64_t decoder::value(const std::string &word) {
  if (word[0] == '0' && (word[1] == 'f' || word[1] == 'd')) return strtoull(&word[2], NULL, 16); /* a real number's bits */
  if (word[0] == '-') return (uint64_t)strtoll(word.c_str(), NULL, 10);
  if (word[0] >= '0' && word[0] <= '9') return strtoull(word.c_str(), NULL, 0);
  auto of_file = shared_variables.find(word); /* of all kernels: placed where one uses it */
  if (of_file != shared_variables.end() && !of_file->second.bytes) {
    dynamic.push_back(p.constants.size()); /* behind all other */
    return 0;
  }
  if (of_file != shared_variables.end() && !shared.count(word)) place(of_file->second);
  if (!shared.count(word)) unknown(word);
  return shared[word];
}

/* The slot of a register, of a place, or of a constant. */
int decoder::operand(const std::string &word, size_t bytes, const scope &s) {
  for (int i = 0; i < PLACE_COUNT; i++)
    if (word == PLACES[i]) return i * 4;
  if (word[0] == '%') {
    if (size(word) != bytes) unknown(word + " of another size");
    return slot(s.prefix + word, bytes);
  }
  std::string name = word + "/" + std::to_string(bytes);
  if (!slots.count(name)) {
    uint64_t number = value(word);
    p.constants.push_back({slot(name, bytes), bytes, number});
  }
  return slots[name];
}

/* Registers, shared memory, where the source is; the rest is for who makes machine code. */
void decoder::directive(const char *&at) {
  std::string name = taken(at, " \t\n");
  words w = words_of(taken(at, name == ".loc" ? "\n" : ";"));
  size_t i = 0;
  if (name == ".loc")
    file = atoi(w.at(0).c_str()), line = atoi(w.at(1).c_str());
  else if (name == ".shared")
    place(declared(w, i));
  else if (name == ".reg")
    for (i = 1; i < w.size(); i++) register_bytes[w[i].substr(0, w[i].find('<'))] = bytes_of(w[0]);
  else if (name != ".param" && name != ".pragma")
    unknown(name);
}

/* ld.param and st.param of what goes into a call and comes back, which are registers. */
void decoder::pass(instruction x, const std::string &name, const std::string &other, const scope &s) {
  auto given = s.parameters.find(name);
  int at = given != s.parameters.end() ? given->second : slot(s.prefix + name, 8), with = operand(other, 8, s);
  if (x.element_bytes != 8 || x.vector != 1 || x.offset != 0) unknown("a call with " + name);
  x.run = operations().at("mov.b64").run;
  x.at[0] = x.stores ? at : with, x.at[1] = x.stores ? with : at;
  p.code.push_back(x);
}

/* ld.space.v4.type {elements}, [address]; st the other way round; ldmatrix */
void decoder::access(instruction x, const words &w, const scope &s) {
  const std::string &op = w[0], type = op.substr(op.rfind('.') + 1), space = op.substr(3, 6);
  const size_t v = op.find(".v"), bytes = bytes_of(type);
  const bool matrices = op.rfind("ldmatrix", 0) == 0;
  x.stores = op[0] == 's';
  x.is_signed = type[0] == 's';
  x.vector = (uint8_t)(matrices ? 4 : v == std::string::npos ? 1 : op[v + 2] - '0');
  x.element_bytes = (uint8_t)(matrices ? 4 : bytes);
  if (w.size() != (size_t)x.vector + 2 || (matrices && x.guard >= 0)) unknown(text_of(w));
  const std::string base = name_of(x.stores ? w[1] : w.back(), &x.offset);
  auto own = parameters.find(base);
  if (space == "param." && own == parameters.end()) return pass(x, base, w[x.stores ? 2 : 1], s);
  for (size_t e = 0; e < x.vector; e++) {
    const std::string &word = w[e + (x.stores ? 2 : 1)];
    x.register_bytes = (uint8_t)(word[0] == '%' ? size(word) : x.element_bytes);
    x.at[e] = operand(word, x.register_bytes, s);
  }
  if (space == "param.") {
    x.offset += (int64_t)own->second;
  } else {
    x.address_bytes = (uint8_t)(base[0] == '%' ? size(base) : 8);
    x.at[x.vector] = operand(base, x.address_bytes, s);
    x.flow = matrices ? flow::TOGETHER : flow::ON;
  }
  x.run = memory_operation(op, bytes * x.vector);
  if (!x.run) unknown(op);
  p.code.push_back(x);
}

/* call (result), name, (arguments): the function's code takes the place of its call. */
void decoder::call(const words &w, const scope &s) {
  scope inner = {s.prefix + std::to_string(calls++) + "/", {{"func_retval0", slot(s.prefix + w.at(1), 8)}}};
  const char *at = functions.at(w.at(2));
  taken(at, "(");
  words parameter = words_of(taken(at, ")"));
  for (size_t i = 3, n = 1; i < w.size(); i++, n++) inner.parameters[declared(parameter, n).name] = slot(s.prefix + w[i], 8);
  body(at + 1, inner);
  labels[inner.prefix] = p.code.size(); /* where it returns to */
}

void decoder::plain(instruction x, const words &w, const scope &s) {
  auto found = operations().find(w[0]);
  if (found == operations().end()) unknown(w[0]);
  const operation &o = found->second;
  x.run = o.run;
  x.flow = o.flow;
  if (o.flow == flow::BRANCH) {
    branches.push_back({p.code.size(), s.prefix + w.at(1)});
  } else if (o.flow == flow::RETURN && !s.prefix.empty()) {
    x.flow = flow::BRANCH;
    branches.push_back({p.code.size(), s.prefix});
  } else if (o.flow == flow::BARRIER) {
    if (w.size() != 2 || w[1] != "0" || x.guard >= 0) unknown(text_of(w));
  } else if (o.flow != flow::RETURN) {
    if (w.size() != o.bytes.size() + 1 || (o.flow == flow::TOGETHER && x.guard >= 0)) unknown(text_of(w));
    for (size_t i = 0; i < o.bytes.size(); i++) x.at[i] = operand(w[i + 1], o.bytes[i], s);
  }
  p.code.push_back(x);
}

void decoder::statement(const std::string &text, const scope &s) {
  words w = words_of(text);
  instruction x;
  x.file = file, x.line = line;
  if (w.at(0)[0] == '@') {
    x.negated = w[0][1] == '!';
    x.guard = operand(w[0].substr(x.negated ? 2 : 1), sizeof(predicate), s);
    w.erase(w.begin());
  }
  if (w[0] == "call.uni" && x.guard < 0) return call(w, s);
  if (w[0].rfind("ld", 0) == 0 || w[0].rfind("st.", 0) == 0) return access(x, w, s);
  if (w[0] != "mov.b64" || w.size() != 4) return plain(x, w, s);
  if (text.find('{') > text.find(',')) return plain(x, {"two halves", w[1], w[2], w[3]}, s);
  plain(x, {"cvt.u32.u64", w[1], w[3]}, s);
  plain(x, {"high half", w[2], w[3]}, s);
}

/* From before a function's opening brace to its closing one. */
void decoder::body(const char *at, const scope &s) {
  int depth = 0;
  do {
    at = skipped(at);
    if (*at == '{' || *at == '}') {
      depth += *at++ == '{' ? 1 : -1;
    } else if (*at == '.') {
      directive(at);
    } else if (*at == ';') {
      at++;
    } else if (*at == '$') {
      labels[s.prefix + taken(at, ":")] = p.code.size();
      at++;
    } else if (*at) {
      statement(taken(at, ";"), s);
      at++;
    } else {
      fail("%s has no end", k.name.c_str());
    }
  } while (depth > 0);
}

/* Parameters, and what machine code is to be made for. */
void decoder::head(const char *at) {
  taken(at, "(");
  words w = words_of(taken(at, ")"));
  for (size_t i = 0; i < w.size();) {
    variable v = declared(w, ++i); /* behind .param */
    size_t begin = k.parameters.empty() ? 0 : k.parameters.back().at + k.parameters.back().bytes;
    parameters[v.name] = aligned_up(begin, v.align);
    k.parameters.push_back({parameters[v.name], v.bytes});
  }
  std::string tuning = taken(at, "{");
  size_t most = tuning.find(".maxntid");
  if (most != std::string::npos) k.most_threads = (unsigned)number(&tuning[most + strlen(".maxntid")]);
  body(at, {});
  for (auto &[from, label] : branches) {
    if (!labels.count(label)) unknown(label);
    p.code[from].target = labels[label];
  }
  k.shared_bytes = aligned_up(k.shared_bytes, 16);
  for (size_t i : dynamic) p.constants[i].value = SHARED_BASE + k.shared_bytes;
}

/* ---- running ---- */

void fill(const machine &m, int slot, uint64_t value, size_t bytes = 4) {
  for (size_t i = 0; i < m.count; i++) memcpy(m.at<char>(slot) + i * bytes, &value, bytes);
}

/* Where mask is set, in whole warps. */
void measure(machine &m) {
  unsigned set = 0;
  for (unsigned i = 0; i < m.count; i++) set += m.mask[i];
  m.first = 0, m.last = m.count;
  m.dense = set == m.count;
  if (m.dense) return;
  while (m.last > 0 && !m.mask[m.last - 1]) m.last--;
  while (m.first < m.last && !m.mask[m.first]) m.first++;
  m.first -= m.first % WARP;
  m.last = (m.last + WARP - 1) / WARP * WARP;
}

/* The threads that go on, those with the lowest program counter, into active and mask. False: no thread can. */
bool choose(machine &m) {
  uint32_t end = (uint32_t)m.code.code.size(), least = end, next = end;
  for (unsigned i = 0; i < m.count; i++) {
    uint32_t pc = m.halted[i] ? end : m.pc[i];
    least = pc < least ? pc : least;
  }
  if (least == end) return false;
  for (unsigned i = 0; i < m.count; i++) {
    uint32_t pc = m.halted[i] ? end : m.pc[i];
    m.active[i] = pc == least;
    next = pc > least && pc < next ? pc : next;
  }
  m.begin = least;
  m.limit = next;
  m.mask = m.active;
  measure(m);
  return true;
}

/* Leaves in mask those of the active threads for which an instruction's guard holds, if it has one. */
void guard(machine &m, const instruction &x) {
  if (x.guard < 0) return;
  const predicate *p = m.at<predicate>(x.guard);
  for (unsigned i = 0; i < m.count; i++) m.mask[i] = m.active[i] & ((p[i] != 0) != x.negated);
}

/* Active threads go to `there` where mask is set, else to `else_there`. */
void part(machine &m, size_t there, size_t else_there) {
  for (unsigned i = 0; i < m.count; i++)
    if (m.active[i]) m.pc[i] = (uint32_t)(m.mask[i] ? there : else_there);
}

enum : uint32_t { NOT_HALTED, AT_BARRIER, IN_WARP };

/* Whether an instruction of whole warps can be done for all active threads. If not, parts of warps wait for the rest of theirs. */
bool warps_are_whole(machine &m, size_t pc) {
  bool whole = true;
  for (unsigned w = m.first; w < m.last && whole; w += WARP)
    for (unsigned i = 1; i < WARP; i++) whole &= m.active[w + i] == m.active[w];
  if (whole) return true;
  part(m, pc, pc);
  for (unsigned w = 0; w < m.count; w += WARP) {
    unsigned here = 0;
    for (unsigned i = w; i < w + WARP; i++) here += m.pc[i] == pc && m.halted[i] != AT_BARRIER;
    for (unsigned i = w; i < w + WARP; i++)
      if (m.pc[i] == pc && m.halted[i] != AT_BARRIER) m.halted[i] = here == WARP ? NOT_HALTED : IN_WARP;
  }
  return false;
}

/* Whether threads at a jump have parted: if not, all are at *pc. */
bool jump(machine &m, const instruction &x, size_t *pc, size_t there) {
  unsigned stay = 0, leave = 0;
  guard(m, x);
  for (unsigned i = 0; i < m.count; i++) stay += m.active[i] & ~m.mask[i], leave += m.mask[i];
  if (stay > 0 && leave > 0) {
    part(m, there, *pc + 1);
    return true;
  }
  *pc = leave > 0 ? there : *pc + 1;
  m.mask = m.active;
  return false;
}

/* The chosen threads go on, until they part, wait or come to where others are. */
void advance(machine &m) {
  size_t pc = m.begin, end = m.code.code.size();
  while (pc < m.limit) {
    const instruction &x = m.code.code[pc];
    m.now = &x;
    switch (x.flow) {
    case flow::BRANCH:
    case flow::RETURN:
      if (jump(m, x, &pc, x.flow == flow::RETURN ? end : x.target)) return;
      continue;
    case flow::BARRIER:
      for (unsigned i = 0; i < m.count; i++)
        if (m.active[i]) m.halted[i] = AT_BARRIER, m.pc[i] = (uint32_t)pc + 1;
      return;
    case flow::TOGETHER:
      if (!warps_are_whole(m, pc)) return;
      x.run(m, x);
      break;
    case flow::ON:
      if (x.guard >= 0) guard(m, x), measure(m);
      x.run(m, x);
      if (x.guard >= 0) m.mask = m.active, measure(m);
    }
    pc++;
  }
  part(m, pc, pc);
}

/* When no thread can go on: opens the barrier. False: all have ended. */
bool open_barrier(machine &m) {
  uint32_t end = (uint32_t)m.code.code.size();
  unsigned ended = 0, first = m.count;
  for (unsigned i = 0; i < m.count; i++) {
    if (m.pc[i] == end && !m.halted[i]) {
      ended++;
      continue;
    }
    if (first == m.count) first = i;
    m.now = &m.code.code[m.pc[i] - (m.halted[i] == AT_BARRIER)];
    if (m.halted[i] == IN_WARP) m.wrong("an instruction of whole warps that a part of one does not reach", i);
    if (m.pc[i] != m.pc[first]) m.wrong("two barriers at a time", i);
  }
  if (ended == m.count) return false;
  if (ended > 0) m.wrong("a barrier that not all threads reach", first);
  m.halted.assign(m.count, NOT_HALTED);
  m.interval_number = take_numbers(m.count + 1);
  return true;
}

void run_block(machine &m, unsigned block) {
  m.block = block;
  fill(m, CTAID_X * 4, block % m.of.blocks_x);
  fill(m, CTAID_Y * 4, block / m.of.blocks_x);
  m.pc.assign(m.count, 0);
  m.halted.assign(m.count, NOT_HALTED);
  memset(m.shared.data(), 0xff, m.shared.size());
  m.block_number = m.interval_number = take_numbers(m.count + 1);
  do {
    while (choose(m)) advance(m);
  } while (open_barrier(m));
}

/* A line that begins with a directive. */
void note(const char *line) {
  words w = words_of(std::string(line, strcspn(line, "\n")));
  size_t i = w[0] == ".extern" || w[0] == ".visible" || w[0] == ".weak" ? 2 : 1;
  const std::string &what = w.at(i - 1);
  if (what == ".entry" || what == ".func") {
    const std::string &name = what == ".entry" ? w.at(i) : w.back();
    const char *behind = strstr(line, name.c_str()) + name.size(), *after = behind;
    taken(after, ")");
    if (*skipped(after + 1) != ';') functions[name] = behind; /* no declaration only */
  } else if (what == ".shared") {
    variable v = declared(w, i);
    shared_variables[v.name] = v;
  } else if (what == ".file") {
    files[atoi(w.at(1).c_str())] = w.at(2);
  }
}

} // namespace

machine::machine(const launch &l, char *registers)
    : of(l), code(*l.of->code), count(l.threads), file(registers), recent(code.code.size()), shared(l.of->shared_bytes + l.shared_bytes),
      shared_cells(shared.size()), launch_number(take_numbers(1)) {
  for (auto *by_thread : {&mask, &pc, &active, &halted}) by_thread->resize(count);
  for (const constant &c : code.constants) fill(*this, c.at, c.value, c.bytes);
  for (unsigned i = 0; i < count; i++) at<uint32_t>(TID_X * 4)[i] = i;
  fill(*this, NTID_X * 4, count);
  fill(*this, NCTAID_X * 4, l.blocks_x);
  fill(*this, NCTAID_Y * 4, l.blocks_y);
}

bool usable() { /* for ptx_operations.cpp; this file is compiled for any CPU */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

void load(const char *text) {
  for (const char *line = text; *line; line += strcspn(line, "\n"), line += *line == '\n')
    if (*line == '.') note(line);
}

const kernel &find(const char *name) {
  kernel &k = kernels[name];
  if (k.code) return k;
  auto at = functions.find(name);
  if (at == functions.end()) fail("no kernel %s", name);
  auto made = std::make_shared<program>();
  k.name = name;
  k.code = made;
  decoder d = {k, *made, {}, {}, {}, {}, {}, {}, {}, 0, 0, 0};
  d.head(at->second);
  return k;
}

void run(const launch &l) {
  const unsigned blocks = l.blocks_x * l.blocks_y;
  size_t file_bytes = aligned_up((size_t)l.of->code->slot_bytes * l.threads, 64);
  std::unique_ptr<char, decltype(&free)> file((char *)aligned_alloc(64, file_bytes), free);
  if (!file) fail("out of memory");
  memset(file.get(), 0xcd, file_bytes);
  forget_touches(l);
  machine m(l, file.get());
  for (unsigned i = 0; i < blocks; i++) run_block(m, l.reversed ? blocks - 1 - i : i);
}

} // namespace ptx
