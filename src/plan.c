/* plan.c: one rank's block traced, and what follows from it. */
#include "plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"
#include "device.h"
#include "record.h"
#include "rehearsal.h"

/* ---- time ---- */

const char *plan_part_name(int part) {
  return part == PLAN_ALLREDUCE ? "all-reduce" : trace_part_name((enum trace_part)part);
}

/* Seconds of each part; their sum is returned. */
static double time_of(const struct machine *machine, const struct trace *trace, double parts[PLAN_PARTS]) {
  double sum = 0;
  for (int i = 0; i < PLAN_PARTS; i++) parts[i] = 0;
  for (int i = 0; i < TRACE_COUNT; i++) {
    double seconds = machine_seconds(machine, (enum trace_operation)i, &trace->row[i]);
    parts[trace_part((enum trace_operation)i)] += seconds;
    sum += seconds;
  }
  return sum;
}

static double larger(double a, double b) {
  return a > b ? a : b;
}

/* What sets the pace, between the first block's coming and the last one's going. */
static double longest(const struct plan *plan, double stream_seconds) {
  return larger(larger(plan->block_seconds, plan->copy_seconds), larger(stream_seconds, plan->write_seconds));
}

static void find_times(struct plan *plan, const struct rehearsal *work) {
  const struct machine *machine = &plan->machine;
  double unused[PLAN_PARTS];
  bool searches = plan->recipe.lwc && plan->recipe.lwc_init == LWC_INIT_SEARCH;
  plan->step_seconds = time_of(machine, &work->step, plan->step);
  plan->block_seconds = time_of(machine, &work->block, plan->block);
  plan->beside_seconds = plan->early_bytes > 0 ? time_of(machine, &work->rest, unused) : 0;
  double early = plan->early_bytes > 0 ? machine_allreduce_seconds(machine, plan->ranks, plan->early_bytes) - plan->beside_seconds : 0,
         reduce = machine_allreduce_seconds(machine, plan->ranks, plan->gradient_bytes - plan->early_bytes) + larger(early, 0);
  if (work->steps > 0) plan->step[PLAN_ALLREDUCE] = reduce;
  plan->step_seconds += plan->step[PLAN_ALLREDUCE];
  plan->block[PLAN_ALLREDUCE] = reduce * (work->steps + (searches ? 1 : 0));
  plan->block_seconds += plan->block[PLAN_ALLREDUCE];
  plan->sample_step = time_of(machine, &work->sample, unused);
  plan->sample_forward = time_of(machine, &work->forward, unused);
  double passes = work->block.row[TRACE_attention_forward].calls / (work->samples > 0 ? work->samples : 1);
  plan->forward_passes = passes - (work->steps > 0 ? plan->recipe.epochs : 0);
  /* Beside the work: the block, its codes, and in each pass a sample of each array of streams on the host. */
  double copied = plan->block_bytes + plan->output_bytes_a_block + passes * plan->memory.streams_on_host;
  plan->copy_seconds = machine->device_memory > 0 ? copied / machine->copy_bandwidth : 0;
  plan->read_seconds = plan->block_bytes / machine->read_bandwidth;
  plan->broadcast_seconds = machine_broadcast_seconds(machine, plan->ranks, plan->block_bytes);
  plan->write_seconds = plan->output_bytes_a_block / machine->write_bandwidth;
  double stream = plan->read_seconds + plan->broadcast_seconds;
  /* The first block is waited for, the last one's writing too. */
  plan->run_seconds = stream + plan->write_seconds + plan->model.blocks * longest(plan, stream);
}

/* ---- memory and traffic ---- */

/* What attention's backward takes in the CPU backend beside its arguments: each head's share of keys and values, and tiles of scores. */
static double attention_scratch(const struct plan *plan, int threads) {
  const struct model *model = &plan->model;
  double T = plan->recipe.seqlen, head = T * model->head_size;
  return (2.0 * model->heads * head + 2.0 * threads * 64 * T) * (double)sizeof(float);
}

/* Places the arrays of hidden states one after the other as samples.c does: each while the card has room for all of it beside the windows of those that
 * are still to be placed. What the program holds back then is part of device_overhead. */
static void place_streams(struct plan *plan, int arrays, double rest /* of the card's memory */, double samples) {
  struct plan_memory *memory = &plan->memory;
  double array = memory->streams / arrays, windows = samples > 0 ? 2 * array / samples : 0, taken = rest + arrays * windows;
  for (int i = 0; i < arrays; i++) {
    if (taken + array <= plan->machine.device_memory) {
      taken += array - windows;
    } else {
      memory->streams_on_host += array;
      memory->windows += windows;
    }
  }
  memory->device = taken;
}

static void find_memory(struct plan *plan, const struct rehearsal *work, int threads) {
  const struct model *model = &plan->model;
  const struct machine *machine = &plan->machine;
  struct plan_memory *memory = &plan->memory;
  double element = machine->element_bytes;
  int arrays = 3 + (plan->recipe.aug_loss ? 1 : 0);
  *memory = (struct plan_memory){0};
  memory->weights = memory->effective = (double)model->elements * element;
  memory->weight_gradient = (double)work->gradient_allocated;
  memory->activations = (double)work->block_allocated - 2 * memory->weights - memory->weight_gradient;
  memory->streams = (double)arrays * work->samples * plan->recipe.seqlen * model->hidden * element;
  memory->record = (double)work->record_allocated;
  memory->learnables = (double)(work->allocated - work->block_allocated) - memory->streams - memory->record;
  memory->image = (double)model->image_bytes;
  bool card = machine->device_memory > 0, one = model->blocks == 1;
  memory->output = memory->record + plan->output_bytes_a_block;
  memory->program = machine->host_overhead;
  memory->backend = card ? machine->device_overhead : attention_scratch(plan, threads);
  double computing = (double)work->allocated - memory->record + memory->backend, common = card ? 0 : memory->weights + memory->effective;
  double neighbours = plan->ranks < machine->ranks_a_node ? plan->ranks : machine->ranks_a_node;
  if (card) place_streams(plan, arrays, computing + memory->record - memory->streams + memory->image, work->samples);
  /* Where no block follows, the image is given back before effective weights are made. */
  double before = memory->image + memory->program,
         own = memory->program + (card ? memory->streams_on_host : computing - common) + (one && !card ? 0 : memory->image);
  memory->host = common + own + memory->output;
  memory->node = larger(common + own * neighbours + memory->output, (card ? 0 : memory->weights) + before * neighbours);
}

/* Whether all is there: on the card, and on the node of rank 0. */
static bool fits(const struct plan *plan) {
  const struct machine *machine = &plan->machine;
  return plan->memory.node <= machine->host_memory && (machine->device_memory == 0 || plan->memory.device <= machine->device_memory);
}

static void find_traffic(struct plan *plan, const struct rehearsal *work) {
  const struct model *model = &plan->model;
  double outside = (double)checkpoint_outside_elements(model), elements = 0;
  for (int i = 0; i < model->tensors; i++) elements += (double)model->tensor[i].rows * (double)model->tensor[i].columns;
  plan->parameters = elements * model->blocks + outside;
  plan->block_bytes = (double)model->image_bytes;
  plan->checkpoint_bytes = plan->block_bytes * model->blocks + outside * (double)model->image_bytes / elements;
  plan->gradient_bytes = work->steps > 0 ? (double)(work->learnables + 1) * (double)sizeof(float) : 0;
  plan->early_bytes = work->steps > 0 && plan->machine.device_memory > 0 ? (double)work->early * (double)sizeof(float) : 0;
  plan->output_bytes_a_block = (double)record_bytes(model, &plan->recipe);
  plan->output_bytes = plan->output_bytes_a_block * model->blocks;
}

/* ---- the plan ---- */

/* For plan->ranks and plan->recipe.batch. */
static int evaluate_plan(struct plan *plan, int threads, struct error *error) {
  struct rehearsal *work = calloc(1, sizeof *work);
  if (!work) return error_set(error, ERROR_WORK, "out of memory for a plan");
  if (rehearse(work, &plan->model, &plan->recipe, plan->ranks, (size_t)plan->machine.element_bytes, NULL, error) == 0) {
    plan->samples_a_rank = work->samples;
    plan->steps_a_block = work->steps;
    find_traffic(plan, work);
    find_memory(plan, work, threads);
    find_times(plan, work);
    plan->fits = fits(plan);
  }
  free(work);
  return error->code;
}

static const char *name_limit(const struct plan *plan) {
  double stream = plan->read_seconds + plan->broadcast_seconds;
  int most = 0;
  if (!plan->fits && plan->machine.device_memory > 0 && plan->memory.device > plan->machine.device_memory) return "memory of the device";
  if (!plan->fits) return "memory of the host";
  if (stream > plan->block_seconds && stream > plan->write_seconds)
    return plan->read_seconds > plan->broadcast_seconds ? "reading the checkpoint" : "the broadcast of blocks";
  if (plan->write_seconds > plan->block_seconds) return "writing the output";
  if (plan->copy_seconds > plan->block_seconds) return "copies between host and device";
  for (int i = 0; i < PLAN_PARTS; i++)
    if (plan->block[i] > plan->block[most]) most = i;
  return plan_part_name(most);
}

/* The largest power of two, not more than the samples, with which all fits. */
static int find_largest_batch(const struct plan *plan, int threads, struct error *error) {
  struct plan other = *plan;
  int largest = 0;
  for (int batch = 1; batch <= plan->recipe.samples && !error->code; batch *= 2) {
    other.recipe.batch = batch;
    if (evaluate_plan(&other, threads, error) == 0 && other.fits) largest = batch;
  }
  return largest;
}

/* The least power of two of ranks of which twice as many would gain less than a tenth. */
static int find_useful_ranks(const struct plan *plan, int threads, struct error *error) {
  enum { MOST = 4096 };
  struct plan other = *plan;
  double before = 0;
  for (other.ranks = 1; other.ranks <= MOST && !error->code; other.ranks *= 2) {
    if (evaluate_plan(&other, threads, error)) break;
    if (before > 0 && before < 1.1 * other.run_seconds) break;
    before = other.run_seconds;
  }
  return other.ranks / 2;
}

/* Times the operations of one block on this host. Few samples tell as much as many. */
static int measure(struct plan *plan, const struct plan_options *options, struct error *error) {
  struct recipe recipe = plan->recipe;
  struct machine *machine = &plan->machine;
  struct rehearsal *rehearsal = calloc(1, sizeof *rehearsal);
  struct world alone = {.size = 1, .local_size = 1};
  struct kernels *k = kernels_open(device_choose(&alone, options->backend, error), options->threads, 0, error);
  if (!rehearsal) error_set(error, ERROR_WORK, "out of memory for a rehearsal");
  recipe.batch = 1;
  if (recipe.samples > 2) recipe.samples = 2;
  if (recipe.epochs > 2) recipe.epochs = 2;
  if (!error->code && rehearse(rehearsal, &plan->model, &recipe, 1, k->element_bytes, k, error) == 0) {
    if (!options->gpu) snprintf(machine->name, sizeof machine->name, "%s %s, %d threads a rank", k->name, k->level, k->threads);
    machine->element_bytes = (double)k->element_bytes;
    memcpy(machine->measured, rehearsal->block.row, sizeof machine->measured);
    machine_write(machine, options->measure, error);
  }
  if (k) k->close(k);
  free(rehearsal);
  return error->code;
}

static int find_machine(struct plan *plan, const struct plan_options *options, struct error *error) {
  machine_cpu(&plan->machine);
  if (options->gpu && machine_find(&plan->machine, options->gpu, error)) return error->code;
  if (options->measured && machine_read(&plan->machine, options->measured, error)) return error->code;
  if (options->ranks_a_node) plan->machine.ranks_a_node = options->ranks_a_node;
  return 0;
}

int plan_make(struct plan *plan, const struct plan_options *options, const struct recipe *recipe, struct error *error) {
  *plan = (struct plan){.recipe = *recipe, .ranks = options->ranks};
  if (find_machine(plan, options, error) || checkpoint_describe(options->model, &plan->model, &plan->headers, error)) return error->code;
  if (options->measure && measure(plan, options, error)) return error->code;
  if (model_check_seqlen(&plan->model, recipe->seqlen, options->model, error)) return error->code;
  if (evaluate_plan(plan, options->threads, error)) return error->code;
  plan->limit = name_limit(plan);
  plan->largest_batch = find_largest_batch(plan, options->threads, error);
  if (!error->code) plan->useful_ranks = find_useful_ranks(plan, options->threads, error);
  return error->code;
}
