/* machine.c: figures of machines, and what they make of an operation's work. */
#include "machine.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "file.h"
#include "printable.h"

#define GIB (1024.0 * 1024 * 1024)

/* Cards: memory and bandwidths by NVIDIA's data sheets, 85 % of the bandwidth; products at 60 to 70 % of the bf16 peak, as cuBLAS reaches on large
 * ones under the cards' power limits; own attention kernels at a third of that. Nodes: 8 cards, NVLink, 400 Gbit/s a card between nodes. These are
 * assumptions until a measured file replaces them. */
static const struct {
  const char *name;
  struct machine machine;
} cards[] = {
    {"h100",
     {.name = "NVIDIA H100 80 GB",
      .device_memory = 79 * GIB,
      .product_flops = 650e12,
      .attention_flops = 200e12,
      .search_flops = 20e12,
      .memory_bandwidth = 2.85e12,
      .node_bandwidth = 300e9}},
    {"h200",
     {.name = "NVIDIA H200 141 GB",
      .device_memory = 140 * GIB,
      .product_flops = 650e12,
      .attention_flops = 200e12,
      .search_flops = 20e12,
      .memory_bandwidth = 4.1e12,
      .node_bandwidth = 300e9}},
    {"a100",
     {.name = "NVIDIA A100 80 GB",
      .device_memory = 79 * GIB,
      .product_flops = 220e12,
      .attention_flops = 70e12,
      .search_flops = 6e12,
      .memory_bandwidth = 1.7e12,
      .node_bandwidth = 200e9}},
};

/* Keys of a file. */
static const struct {
  const char *key;
  size_t offset;
} numbers[] = {
#define NUMBER(member)                                                                                                                     \
  { #member, offsetof(struct machine, member) }
    NUMBER(element_bytes),   NUMBER(ranks_a_node),   NUMBER(device_memory),   NUMBER(device_overhead), NUMBER(host_memory),
    NUMBER(host_overhead),   NUMBER(product_flops),  NUMBER(attention_flops), NUMBER(search_flops),    NUMBER(memory_bandwidth),
    NUMBER(call_seconds),    NUMBER(copy_bandwidth), NUMBER(node_bandwidth),  NUMBER(node_latency),    NUMBER(network_bandwidth),
    NUMBER(network_latency), NUMBER(read_bandwidth), NUMBER(write_bandwidth),
#undef NUMBER
};

/* What this program takes by itself, with the libraries that it was built with, and MPI once it has been started. */
static double program_bytes(void) {
  struct rusage usage;
  return (getrusage(RUSAGE_SELF, &usage) == 0 ? 1024.0 * (double)usage.ru_maxrss : 0) + 35 * 1024.0 * 1024;
}

void machine_cpu(struct machine *machine) {
  *machine = (struct machine){.name = "a CPU core",
                              .element_bytes = 4,
                              .ranks_a_node = 1,
                              .host_memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE),
                              .host_overhead = program_bytes(),
                              .product_flops = 100e9,
                              .attention_flops = 50e9,
                              .search_flops = 20e9,
                              .memory_bandwidth = 10e9,
                              .call_seconds = 1e-6,
                              .node_bandwidth = 5e9,
                              .node_latency = 2e-6,
                              .network_bandwidth = 1e9,
                              .network_latency = 50e-6,
                              .read_bandwidth = 1e9,
                              .write_bandwidth = 0.5e9};
}

/* What the cards have in common. */
static void card(struct machine *machine, const struct machine *own) {
  *machine = *own;
  machine->element_bytes = 2;
  machine->ranks_a_node = 8;
  machine->device_overhead = 1.5 * GIB;
  machine->host_memory = 1024 * GIB;
  machine->host_overhead = 0.75 * GIB;
  machine->call_seconds = 5e-6;
  machine->copy_bandwidth = 20e9;
  machine->node_latency = 10e-6;
  machine->network_bandwidth = 40e9;
  machine->network_latency = 20e-6;
  machine->read_bandwidth = 2e9;
  machine->write_bandwidth = 1e9;
}

static int read_number(const json_t *object, const char *where, const char *key, double *number, struct error *error) {
  const json_t *value = json_object_get(object, key);
  if (!value) return 0;
  if (!json_is_number(value) || !(json_number_value(value) >= 0))
    return error_set(error, ERROR_INPUT, "%s: %s: not a number from 0 on", where, key);
  *number = json_number_value(value);
  return 0;
}

static int read_operations(struct machine *machine, const json_t *operations, const char *path, struct error *error) {
  if (operations && !json_is_object(operations)) return error_set(error, ERROR_INPUT, "%s: operations: not an object", path);
  for (int i = 0; operations && i < TRACE_COUNT && !error->code; i++) {
    const char *name = trace_name((enum trace_operation)i);
    const json_t *object = json_object_get(operations, name);
    struct trace_row *row = &machine->measured[i];
    char where[4200];
    snprintf(where, sizeof where, "%s: operations: %s", path, name);
    if (!object) continue;
    if (read_number(object, where, "calls", &row->calls, error) || read_number(object, where, "flops", &row->flops, error) ||
        read_number(object, where, "bytes", &row->bytes, error))
      return error->code;
    read_number(object, where, "seconds", &row->seconds, error);
  }
  return error->code;
}

/* Rates that are divided by, and types that backends have. */
static int check_machine(const struct machine *machine, const char *path, struct error *error) {
  const double above[] = {machine->ranks_a_node,      machine->product_flops,
                          machine->attention_flops,   machine->search_flops,
                          machine->memory_bandwidth,  machine->node_bandwidth,
                          machine->network_bandwidth, machine->read_bandwidth,
                          machine->write_bandwidth,   machine->device_memory > 0 ? machine->copy_bandwidth : 1};
  static const char *const names[] = {"ranks_a_node",   "product_flops",     "attention_flops", "search_flops",    "memory_bandwidth",
                                      "node_bandwidth", "network_bandwidth", "read_bandwidth",  "write_bandwidth", "copy_bandwidth"};
  if (machine->element_bytes != 2 && machine->element_bytes != 4)
    return error_set(error, ERROR_INPUT, "%s: element_bytes: not 2 or 4", path);
  for (size_t i = 0; i < sizeof above / sizeof *above; i++)
    if (!(above[i] > 0)) return error_set(error, ERROR_INPUT, "%s: %s: not a number above 0", path, names[i]);
  return 0;
}

/* The key that no file may have, or NULL. */
static const char *unknown_key(json_t *root) {
  const char *key;
  json_t *value;
  json_object_foreach(root, key, value) {
    bool known = strcmp(key, "name") == 0 || strcmp(key, "operations") == 0;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) known = known || strcmp(key, numbers[i].key) == 0;
    if (!known) return key;
  }
  return NULL;
}

static int read_object(struct machine *machine, json_t *root, const char *path, struct error *error) {
  const json_t *name = json_object_get(root, "name");
  const char *unknown = unknown_key(root);
  if (!json_is_object(root)) return error_set(error, ERROR_INPUT, "%s: not a JSON object; docs/plan.md has its keys", path);
  if (unknown) return error_set(error, ERROR_INPUT, "%s: %s: no such key; docs/plan.md has them", path, printable(unknown).text);
  if (json_is_string(name)) snprintf(machine->name, sizeof machine->name, "%.60s", printable(json_string_value(name)).text);
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers && !error->code; i++)
    read_number(root, path, numbers[i].key, (double *)(void *)((char *)machine + numbers[i].offset), error);
  if (!error->code) read_operations(machine, json_object_get(root, "operations"), path, error);
  return error->code ? error->code : check_machine(machine, path, error);
}

int machine_read(struct machine *machine, const char *path, struct error *error) {
  json_error_t reason;
  json_t *root = json_load_file(path, 0, &reason);
  if (!root)
    return error_set(error, ERROR_INPUT, "%s: %s; give a machine's figures in JSON (docs/plan.md)", path, printable(reason.text).text);
  read_object(machine, root, path, error);
  json_decref(root);
  return error->code;
}

int machine_write(const struct machine *machine, const char *path, struct error *error) {
  json_t *operations = json_object(),
         *root = json_pack("{s:s, s:f, s:f, s:O}", "name", machine->name, "element_bytes", machine->element_bytes, "ranks_a_node",
                           machine->ranks_a_node, "operations", operations);
  for (int i = 0; root && i < TRACE_COUNT; i++) {
    const struct trace_row *row = &machine->measured[i];
    if (row->seconds > 0)
      json_object_set_new(
          operations, trace_name((enum trace_operation)i),
          json_pack("{s:f, s:f, s:f, s:f}", "calls", row->calls, "flops", row->flops, "bytes", row->bytes, "seconds", row->seconds));
  }
  char *text = root ? json_dumps(root, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) : NULL;
  if (text)
    file_write(path, text, strlen(text), error);
  else
    error_set(error, ERROR_WORK, "out of memory for %s", path);
  free(text);
  json_decref(operations);
  json_decref(root);
  return error->code;
}

int machine_find(struct machine *machine, const char *name, struct error *error) {
  machine_cpu(machine);
  for (size_t i = 0; i < sizeof cards / sizeof *cards; i++) {
    if (strcmp(cards[i].name, name) != 0) continue;
    card(machine, &cards[i].machine);
    return 0;
  }
  if (access(name, F_OK) != 0)
    return error_set(error, ERROR_INPUT, "--gpu: '%s' is neither h100, h200, a100 nor a file of a machine's figures", printable(name).text);
  return machine_read(machine, name, error);
}

/* ---- time ---- */

static double larger(double a, double b) {
  return a > b ? a : b;
}

static double rate_of(const struct machine *machine, enum trace_operation operation) {
  if (operation == TRACE_attention_forward || operation == TRACE_attention_backward) return machine->attention_flops;
  return operation == TRACE_clip_search ? machine->search_flops : machine->product_flops;
}

double machine_seconds(const struct machine *machine, enum trace_operation operation, const struct trace_row *work) {
  const struct trace_row *measured = &machine->measured[operation];
  if (work->calls == 0) return 0;
  if (measured->seconds > 0 && measured->flops > 0) return measured->seconds * work->flops / measured->flops;
  if (measured->seconds > 0 && measured->bytes > 0) return measured->seconds * work->bytes / measured->bytes;
  double seconds = larger(work->bytes / machine->memory_bandwidth, work->calls * machine->call_seconds);
  return work->flops > 0 ? larger(seconds, work->flops / rate_of(machine, operation)) : seconds;
}

double machine_allreduce_seconds(const struct machine *machine, int ranks, double bytes) {
  double seconds = 0;
  for (int distance = 1; distance < ranks; distance *= 2) {
    bool inside = distance < machine->ranks_a_node;
    double latency = inside ? machine->node_latency : machine->network_latency;
    bytes /= 2;
    seconds += 2 * (latency + bytes / (inside ? machine->node_bandwidth : machine->network_bandwidth));
    seconds += 3 * bytes / machine->memory_bandwidth; /* the sum of two arrays */
  }
  return seconds;
}

double machine_broadcast_seconds(const struct machine *machine, int ranks, double bytes) {
  if (ranks == 1) return 0;
  return ranks <= machine->ranks_a_node ? bytes / machine->node_bandwidth : bytes / machine->network_bandwidth;
}
