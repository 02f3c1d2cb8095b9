/* plan_report.c: a plan as a table, and as JSON. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "plan.h"

static const double GIB = 1024.0 * 1024 * 1024;

/* ---- table ---- */

/* "1.2 ms", "34.5 s", "1h23m" */
static const char *duration(double seconds, char text[32]) {
  if (seconds < 0.1)
    snprintf(text, 32, "%.3g ms", 1e3 * seconds);
  else if (seconds < 600)
    snprintf(text, 32, "%.3g s", seconds);
  else
    snprintf(text, 32, "%dh%02dm", (int)(seconds / 3600), (int)(seconds / 60) % 60);
  return text;
}

static void print_bytes(const char *what, double bytes, const char *note) {
  if (bytes < GIB / 10)
    printf("  %-34s %9.1f MiB%s\n", what, bytes / (1 << 20), note);
  else
    printf("  %-34s %9.2f GiB%s\n", what, bytes / GIB, note);
}

static void print_seconds(const char *what, double seconds, const char *note) {
  char text[32];
  printf("  %-34s %13s%s\n", what, duration(seconds, text), note);
}

static void print_head(const struct plan *plan) {
  const struct recipe *recipe = &plan->recipe;
  printf("%s, %d blocks, %.4g parameters (%s)\n", plan->model.model_type, plan->model.blocks, plan->parameters,
         plan->headers ? "types by the safetensors' headers" : "no safetensors there: types by config.json");
  printf("W%dA%d%s%.0d%s%s, %d samples x %d tokens, batch %d, %d epochs: %d steps a block\n", recipe->wbits, recipe->activations.abits,
         recipe->group_size ? "g" : "", recipe->group_size, recipe->lwc ? " LWC" : "", recipe->let ? " LET" : "", recipe->samples,
         recipe->seqlen, recipe->batch, recipe->epochs, plan->steps_a_block);
  printf("%d ranks, %.0f a node: %s\n", plan->ranks, plan->machine.ranks_a_node, plan->machine.name);
}

static void print_memory(const struct plan *plan) {
  const struct plan_memory *memory = &plan->memory;
  bool card = plan->machine.device_memory > 0;
  printf("\nmemory of a rank%s\n", card ? ", on the device" : "");
  print_bytes("weights of a block", memory->weights, "");
  print_bytes("effective weights", memory->effective, "");
  print_bytes("gradient of some rows of a weight", memory->weight_gradient, "");
  print_bytes("activations of a sample", memory->activations, "");
  print_bytes(card ? "streams of its samples, there too" : "streams of its samples",
              memory->streams - memory->streams_on_host + memory->windows,
              memory->streams_on_host > 0 ? "  of those on the host two samples each" : "");
  print_bytes("learnables and their optimizer", memory->learnables, "");
  print_bytes(card ? "context, libraries, NCCL" : "scratch of kernels", memory->backend, "");
  if (card) {
    print_bytes("the next block as it comes", memory->image, "");
    print_bytes("a block's codes (rank 0)", memory->record, "");
    print_bytes("all, on the device", memory->device, "");
    printf("memory of rank 0, on the host\n");
  }
  print_bytes("a block as it is read", memory->image, "");
  if (memory->streams_on_host > 0) print_bytes("streams of its samples, pinned", memory->streams_on_host, "");
  print_bytes("a block being stored (rank 0)", memory->output, "");
  print_bytes("program", memory->program, "");
  print_bytes(card ? "all, on the host" : "all (rank 0)", memory->host, "");
  if (memory->node > memory->host) print_bytes("all ranks of its node", memory->node, card ? "" : ", which hold weights in common");
}

static void print_traffic(const struct plan *plan) {
  printf("\ndisk and network\n");
  print_bytes("checkpoint, read once", plan->checkpoint_bytes, "");
  print_bytes("a block, read and broadcast", plan->block_bytes, "");
  print_bytes("gradients, all-reduced a step", plan->gradient_bytes, "");
  print_bytes("output on disk", plan->output_bytes, "");
}

static void print_times(const struct plan *plan) {
  printf("\ntime %35s %16s\n", "a step", "a block");
  for (int i = 0; i < PLAN_PARTS; i++) {
    char step[32], block[32];
    if (plan->block[i] == 0) continue;
    printf("  %-24s %13s %16s  %4.0f %%\n", plan_part_name(i), duration(plan->step[i], step), duration(plan->block[i], block),
           plan->block_seconds > 0 ? 100 * plan->block[i] / plan->block_seconds : 0);
  }
  char step[32], block[32];
  printf("  %-24s %13s %16s\n", "all", duration(plan->step_seconds, step), duration(plan->block_seconds, block));
  print_seconds("reading a block", plan->read_seconds, "  beside the block before");
  print_seconds("broadcasting it", plan->broadcast_seconds, "  beside the block before");
  print_seconds("writing it", plan->write_seconds, "  beside the next");
}

static void print_verdict(const struct plan *plan) {
  char text[32];
  printf("\n");
  if (plan->fits)
    printf("run: %s, %.4g %s hours\n", duration(plan->run_seconds, text), plan->run_seconds / 3600 * plan->ranks,
           plan->machine.device_memory > 0 ? "GPU" : "rank");
  else
    printf("run: does not fit\n");
  printf("limit: %s\n", plan->limit);
  printf("largest batch that fits: %d; more than %d ranks gain less than 10 %% by doubling\n", plan->largest_batch, plan->useful_ranks);
}

/* ---- JSON ---- */

static json_t *parts_json(const double parts[PLAN_PARTS], double sum) {
  json_t *object = json_object();
  for (int i = 0; i < PLAN_PARTS; i++) json_object_set_new(object, plan_part_name(i), json_real(parts[i]));
  json_object_set_new(object, "sum", json_real(sum));
  return object;
}

static json_t *memory_json(const struct plan_memory *memory) {
  return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "weights", memory->weights, "effective",
                   memory->effective, "weight_gradient", memory->weight_gradient, "activations", memory->activations, "streams",
                   memory->streams, "streams_on_host", memory->streams_on_host, "learnables", memory->learnables, "backend",
                   memory->backend, "image", memory->image, "record", memory->record, "output", memory->output, "program", memory->program,
                   "device", memory->device, "host", memory->host, "node", memory->node);
}

/* What bench/simulate.py needs of the work. */
static json_t *workload_json(const struct plan *plan) {
  const struct recipe *recipe = &plan->recipe;
  double slots = plan->steps_a_block ? (double)plan->samples_a_rank * recipe->epochs / plan->steps_a_block : 0; /* of a rank and step */
  double step = plan->step_seconds - plan->step[PLAN_ALLREDUCE] - slots * plan->sample_step;
  double passes = plan->forward_passes * plan->samples_a_rank * plan->sample_forward;
  double block = plan->block_seconds - plan->steps_a_block * plan->step_seconds - passes;
  return json_pack("{s:i, s:i, s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "blocks", plan->model.blocks, "samples",
                   recipe->samples, "batch", recipe->batch, "steps_a_block", plan->steps_a_block, "fixed_seconds_a_step",
                   step > 0 ? step : 0, "seconds_a_sample_step", plan->sample_step, "seconds_a_sample_forward", plan->sample_forward,
                   "forward_passes_a_block", plan->forward_passes, "fixed_seconds_a_block", block > 0 ? block : 0, "block_bytes",
                   plan->block_bytes, "gradient_bytes", plan->gradient_bytes, "early_bytes", plan->early_bytes, "seconds_beside_early",
                   plan->beside_seconds, "output_bytes_a_block", plan->output_bytes_a_block);
}

static json_t *cluster_json(const struct plan *plan) {
  const struct machine *machine = &plan->machine;
  return json_pack("{s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "ranks", plan->ranks, "ranks_a_node", machine->ranks_a_node,
                   "latency_seconds", machine->network_latency, "bytes_a_second", machine->network_bandwidth, "node_latency_seconds",
                   machine->node_latency, "node_bytes_a_second", machine->node_bandwidth, "read_bytes_a_second", machine->read_bandwidth,
                   "write_bytes_a_second", machine->write_bandwidth);
}

static int print_json(const struct plan *plan, struct error *error) {
  json_t *object = json_pack(
      "{s:s, s:i, s:f, s:b, s:s, s:i, s:i, s:o, s:b, s:f, s:f, s:f, s:f, s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:f, s:s, s:i, s:i, s:o, s:o}",
      "model_type", plan->model.model_type, "blocks", plan->model.blocks, "parameters", plan->parameters, "headers", plan->headers,
      "machine", plan->machine.name, "ranks", plan->ranks, "steps_a_block", plan->steps_a_block, "memory_bytes", memory_json(&plan->memory),
      "fits", plan->fits, "checkpoint_bytes", plan->checkpoint_bytes, "block_bytes", plan->block_bytes, "gradient_bytes",
      plan->gradient_bytes, "output_bytes", plan->output_bytes, "step_seconds", parts_json(plan->step, plan->step_seconds), "block_seconds",
      parts_json(plan->block, plan->block_seconds), "read_seconds", plan->read_seconds, "broadcast_seconds", plan->broadcast_seconds,
      "write_seconds", plan->write_seconds, "copy_seconds", plan->copy_seconds, "run_seconds", plan->run_seconds, "gpu_hours",
      plan->run_seconds / 3600 * plan->ranks, "limit", plan->limit, "largest_batch", plan->largest_batch, "useful_ranks",
      plan->useful_ranks, "workload", workload_json(plan), "cluster", cluster_json(plan));
  char *text = object ? json_dumps(object, JSON_INDENT(1) | JSON_REAL_PRECISION(15)) : NULL;
  if (text)
    puts(text);
  else
    error_set(error, ERROR_WORK, "out of memory for a plan");
  free(text);
  json_decref(object);
  return error->code;
}

int plan_print(const struct plan_options *options, const struct recipe *recipe, struct error *error) {
  struct plan *plan = malloc(sizeof *plan);
  if (!plan) return error_set(error, ERROR_WORK, "out of memory for a plan");
  if (plan_make(plan, options, recipe, error) == 0) {
    if (options->json) {
      print_json(plan, error);
    } else {
      print_head(plan);
      print_memory(plan);
      print_traffic(plan);
      print_times(plan);
      print_verdict(plan);
    }
  }
  free(plan);
  return error->code;
}
