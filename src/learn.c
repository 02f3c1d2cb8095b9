/* learn.c: start, steps, and the choice of the best. */
#include "learn.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

/* ---- memory ---- */

static int64_t sample_elements(const struct learner *l) {
  return (int64_t)l->block->tokens * l->block->model->hidden;
}

static bool searches(const struct learner *l) {
  return l->recipe->lwc && l->recipe->lwc_init == LWC_INIT_SEARCH;
}

static bool learns(const struct learner *l) {
  return (l->recipe->lwc || l->recipe->let) && l->recipe->epochs > 0;
}

/* A layer that reads the same as this one and comes first: importance is taken for it alone. */
static int first_reader(const struct model *model, int linear) {
  enum linear_role role = role_of_linear(linear);
  if (role <= LINEAR_V) return LINEAR_Q;
  return role == LINEAR_UP && model->linear[linear - 1].quantized ? linear - 1 : linear;
}

/* Whether a step's work is handed to the device to be repeated: experts see other numbers of tokens each time. */
static bool repeats(const struct learner *l) {
  return l->k->repeat && l->block->model->experts == 0;
}

/* Whether gradients that a sample's backward pass has first are summed over ranks beside the rest of it: where devices do it by themselves, and there
 * are such gradients. */
static bool sums_beside(const struct learner *l) {
  return device_stream_link(l->world) && l->recipe->lwc && learns(l);
}

static void place_importances(struct learner *l) {
  const struct model *model = l->block->model;
  for (int i = 0; i < model->linears; i++) {
    int first = first_reader(model, i);
    l->importance_at[i] = first == i ? l->importances : l->importance_at[first];
    if (first == i && model->linear[i].quantized) l->importances += model->linear[i].columns;
  }
}

static bool log_open(struct learner *l, size_t steps) {
  struct kernels *k = l->k;
  if (!k->lane_open) return (l->log.at = calloc(steps + 1, sizeof *l->log.at));
  l->log.at = k->allocate_host(k, (steps + 1) * sizeof *l->log.at);
  for (int i = 0; i < 2; i++) l->log.lane[i] = k->lane_open(k);
  return l->log.at && l->log.lane[0] && l->log.lane[1];
}

static void log_close(struct learner *l) {
  if (!l->k->lane_open) {
    free(l->log.at);
    return;
  }
  for (int i = 0; i < 2; i++) l->k->lane_close(l->k, l->log.lane[i]);
  l->k->release_host(l->k, l->log.at);
}

int learner_init(struct learner *l, struct error *error) {
  struct kernels *k = l->k;
  if (lwc_init(&l->lwc, l->block->model, k, l->recipe, error)) return error->code;
  if (let_init(&l->let, l->block->model, k, l->recipe, error)) return error->code;
  l->count = 2 * l->lwc.groups + l->let.count;
  if (searches(l)) place_importances(l);
  size_t count = (size_t)l->count, columns = (size_t)l->importances;
  int64_t summed = l->count + 1 > l->importances ? l->count + 1 : l->importances;
  size_t steps = (size_t)l->recipe->epochs * (size_t)l->shard->steps;
  size_t sample_bytes = (size_t)sample_elements(l) * k->element_bytes;
  if (samples_init(&l->x_q, k, l->shard->count, sample_elements(l), l->world->rank, error) ||
      samples_init(&l->next, k, l->shard->count, sample_elements(l), l->world->rank, error))
    return error->code;
  if (l->recipe->aug_loss && samples_init(&l->augmented, k, l->shard->count, sample_elements(l), l->world->rank, error)) return error->code;
  struct {
    void *field;
    size_t bytes;
    bool needed;
  } device[] = {
      {&l->y, sample_bytes, true},
      {&l->dy, sample_bytes, true},
      {&l->copy.x, sample_bytes, repeats(l)},
      {&l->copy.target, sample_bytes, repeats(l)},
      {&l->copy.augmented, sample_bytes, repeats(l) && l->recipe->aug_loss},
      {&l->gradient, (count + 1) * sizeof(float), true},
      {&l->scratch, shard_scratch(l->shard, summed) * sizeof(float), true},
      {&l->m, count * sizeof(float), true},
      {&l->v, count * sizeof(float), true},
      {&l->start, count * sizeof(float), true},
      {&l->importance, 2 * columns * sizeof(float), true},
      {&l->step_loss, steps * sizeof(float), true},
      {&l->sample_loss, (size_t)l->shard->count * sizeof(float), true},
      {&l->state, sizeof *l->state, true},
  };
  for (size_t i = 0; i < sizeof device / sizeof *device; i++) {
    if (!device[i].needed) continue;
    void *memory = k->allocate(k, device[i].bytes);
    if (!memory)
      return error_set(error, ERROR_WORK, "rank %d: out of memory on %s for learning (%zu bytes)", l->world->rank, k->name,
                       device[i].bytes);
    memcpy(device[i].field, &memory, sizeof memory);
  }
  if (sums_beside(l) && !(l->sums = k->lane_open(k))) return k->synchronize(k, error);
  l->losses = calloc(2 * (size_t)l->shard->samples, sizeof(float));
  l->epoch_loss = calloc((size_t)l->recipe->epochs + 1, sizeof(float));
  return log_open(l, steps) && l->losses && l->epoch_loss ? 0 : error_set(error, ERROR_WORK, "out of memory for losses");
}

int learner_place(struct learner *l, struct error *error) {
  if (samples_place(&l->x_q, error) || samples_place(&l->next, error)) return error->code;
  return l->recipe->aug_loss ? samples_place(&l->augmented, error) : 0;
}

void learner_free(struct learner *l) {
  void *const device[] = {l->y, l->dy, l->copy.x, l->copy.target, l->copy.augmented, l->gradient,    l->scratch,
                          l->m, l->v,  l->start,  l->importance,  l->step_loss,      l->sample_loss, l->state};
  if (!l->k) return;
  samples_free(&l->x_q);
  samples_free(&l->next);
  samples_free(&l->augmented);
  for (int i = 0; i < LEARNER_MOST_RECORDINGS; i++)
    if (l->recording[i].made) l->k->forget(l->k, l->recording[i].made);
  if (l->quantizing) l->k->forget(l->k, l->quantizing);
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    if (device[i]) l->k->release(l->k, device[i]);
  if (l->sums) l->k->lane_close(l->k, l->sums);
  log_close(l);
  free(l->losses);
  free(l->epoch_loss);
  lwc_free(&l->lwc);
  let_free(&l->let);
}

static void poll(struct learner *l) {
  if (l->stream) stream_poll(l->stream);
}

/* ---- forward passes over all samples ---- */

void learner_quantize(struct learner *l, struct learned with, bool at_rest) {
  let_fold(&l->let, l->block, with.let);
  lwc_quantize(&l->lwc, l->block, &l->let, with.factor, at_rest);
}

static struct sample sample_of(struct learner *l, int local) {
  return (struct sample){samples_read(&l->x_q, local), samples_read(&l->target->x, local),
                         l->recipe->aug_loss ? samples_read(&l->augmented, local) : NULL};
}

/* Loss of a sample's output y: method.md section 4, step 2. */
static void sample_loss(struct learner *l, float *loss, data *dy, const data *y, const struct sample *sample, float weight) {
  l->k->mse(l->k, loss, dy, y, sample->target, sample_elements(l), weight, false);
  if (sample->augmented) l->k->mse(l->k, loss, dy, y, sample->augmented, sample_elements(l), weight, true);
}

/* Mean loss over all samples with the weights at rest, and the block's outputs in `next`. Collective. */
static double measure(struct learner *l, struct learned with) {
  int samples = l->shard->samples, count = l->shard->count;
  learner_quantize(l, with, true);
  for (int i = 0; i < count && !world_stopping(l->world); i++) {
    data *y = samples_write(&l->next, i);
    struct sample sample = sample_of(l, i);
    block_forward(l->block, BLOCK_QUANTIZED, y, sample.x);
    sample_loss(l, l->sample_loss + i, NULL, y, &sample, 1);
    poll(l);
  }
  float *mine = l->losses + samples; /* gathered by a sum in which every sample has one rank's value */
  memset(l->losses, 0, (size_t)samples * sizeof(float));
  l->k->download(l->k, mine, l->sample_loss, (size_t)count * sizeof(float));
  for (int i = 0; i < count; i++) l->losses[shard_sample(l->shard, i)] = mine[i];
  world_allreduce(l->world, l->losses, (size_t)samples, mine);
  double total = 0;
  for (int i = 0; i < samples; i++) total += l->losses[i];
  return total / samples;
}

/* One sample through the full-precision block on the quantized stream: the second target, and the columns' sums of squares. */
static void observe_sample(void *context, int local, float *out) {
  struct learner *l = context;
  const struct model *model = l->block->model;
  if (world_stopping(l->world)) return;
  block_forward(l->block, BLOCK_FULL, l->recipe->aug_loss ? samples_write(&l->augmented, local) : l->y, samples_read(&l->x_q, local));
  l->k->clear(l->k, out, (size_t)l->importances * sizeof(float));
  for (int i = 0; i < model->linears && l->importances; i++) {
    int64_t rows;
    if (!model->linear[i].quantized || first_reader(model, i) != i) continue;
    const data *x = block_input(l->block, i, &rows);
    l->k->column_squares(l->k, out + l->importance_at[i], x, rows, model->linear[i].columns);
  }
  poll(l);
}

static void observe_pass(struct learner *l) {
  int64_t columns = l->importances;
  float *step = l->importance + columns;
  l->k->clear(l->k, l->importance, (size_t)columns * sizeof(float));
  struct step_sum sum = {observe_sample, l, l->k, l->world, step, l->scratch, .count = columns};
  for (int i = 0; i < l->shard->steps; i++) {
    shard_step_sum(l->shard, i, &sum);
    l->k->add(l->k, l->importance, step, columns);
  }
}

static void search(struct learner *l) {
  const float *importance[MODEL_MAX_LINEARS];
  for (int i = 0; i < l->block->model->linears; i++) importance[i] = l->importance + l->importance_at[i];
  lwc_search(&l->lwc, l->block, &l->let, importance, l->world);
}

/* ---- training ---- */

static struct learned in_training(const struct learner *l) {
  return (struct learned){l->recipe->lwc ? l->lwc.factor : NULL, l->recipe->let ? l->let.parameter : NULL};
}

static struct learned at_start(const struct learner *l) {
  return (struct learned){l->recipe->lwc ? l->start : NULL, l->recipe->let ? l->start + 2 * l->lwc.groups : NULL};
}

struct sink_context {
  struct learner *learner;
  float *gradient; /* [count] */
};

static void take_weight_gradient(void *context, int linear, struct row_range rows, const data *dw) {
  const struct sink_context *sink = context;
  struct learner *l = sink->learner;
  const struct linear *layer = &l->block->model->linear[linear];
  if (layer->quantized)
    lwc_backward(&l->lwc, l->block, &l->let, linear, rows, dw, in_training(l).factor, l->recipe->lwc ? sink->gradient : NULL, l->let.drow,
                 l->let.dcolumn);
  else
    let_backward_weight(&l->let, l->block, linear, rows, dw, l->let.drow, l->let.dcolumn);
  let_backward_scales(&l->let, linear, rows, l->let.drow, l->let.dcolumn, l->let.parameter, sink->gradient + 2 * l->lwc.groups);
}

static void take_vector_gradient(void *context, int tensor, const float *d) {
  const struct sink_context *sink = context;
  struct learner *l = sink->learner;
  let_backward_vector(&l->let, l->block, tensor, d, l->let.parameter, sink->gradient + 2 * l->lwc.groups);
}

void learner_backward(struct learner *l, enum sample_part part, float *gradient, const data *dy, const data *x) {
  struct sink_context context = {l, gradient};
  struct gradient_sink sink = {take_weight_gradient, l->recipe->let ? take_vector_gradient : NULL, &context};
  bool cleared = l->block->model->experts > 0 || l->recipe->let; /* experts without tokens give none, and LET's are added up */
  if (part != SAMPLE_REST && cleared) l->k->clear(l->k, gradient, (size_t)l->count * sizeof *gradient);
  if (part != SAMPLE_REST) block_backward_mlp(l->block, BLOCK_QUANTIZED, false, dy, &sink);
  if (part != SAMPLE_BEGINNING) block_backward_attention(l->block, BLOCK_QUANTIZED, NULL, x, &sink);
}

struct step_context {
  struct learner *learner;
  float weight; /* 1 / samples of the step */
};

/* One sample's part of a step. */
struct sample_work {
  struct learner *learner;
  enum sample_part part;
  struct sample sample;
  float weight;
  float *out; /* [count + 1] gradient, and the loss */
};

static void sample_work(void *context) {
  const struct sample_work *work = context;
  struct learner *l = work->learner;
  if (work->part != SAMPLE_REST) {
    block_forward(l->block, BLOCK_QUANTIZED, l->y, work->sample.x);
    sample_loss(l, work->out + l->count, l->dy, l->y, &work->sample, work->weight);
  }
  learner_backward(l, work->part, work->out, l->dy, work->sample.x);
}

/* The same work for every sample, out of a copy of it: what a device can repeat by itself. */
static void repeat_work(struct learner *l, struct sample_work *work) {
  size_t bytes = (size_t)sample_elements(l) * l->k->element_bytes;
  if (work->part != SAMPLE_REST) {
    l->k->copy(l->k, l->copy.x, work->sample.x, bytes);
    l->k->copy(l->k, l->copy.target, work->sample.target, bytes);
    if (l->copy.augmented) l->k->copy(l->k, l->copy.augmented, work->sample.augmented, bytes);
  }
  work->sample = l->copy;
  struct recording *r = l->recording;
  while (r->out && (r->out != work->out || r->weight != work->weight || r->part != work->part)) r++;
  *r = (struct recording){work->out, work->weight, work->part, r->made};
  l->k->repeat(l->k, &r->made, sample_work, work);
}

static void sample_part(const struct step_context *step, enum sample_part part, int local, float *out) {
  struct learner *l = step->learner;
  struct sample_work work = {l, part, sample_of(l, local), step->weight, out};
  if (world_stopping(l->world)) return;
  if (repeats(l))
    repeat_work(l, &work);
  else
    sample_work(&work);
  poll(l);
}

/* A sample's gradient and loss. */
static void sample_gradient(void *context, int local, float *out) {
  sample_part(context, SAMPLE_WHOLE, local, out);
}

static void begin_gradient(void *context, int local, float *out) {
  sample_part(context, SAMPLE_BEGINNING, local, out);
}

static void finish_gradient(void *context, int local, float *out) {
  sample_part(context, SAMPLE_REST, local, out);
}

/* By AdamW the factors, unless sign updates move them, and LET's parameters: at once. */
static void update_by_adamw(struct learner *l, float batch) {
  int64_t factors = l->recipe->lwc && l->recipe->optimizer == OPTIMIZER_ADAMW ? 2 * l->lwc.groups : 0, first = 2 * l->lwc.groups - factors;
  const struct learnables of[2] = {{l->lwc.parameter, factors, (float)l->recipe->lwc_lr * batch},
                                   {l->let.parameter, l->recipe->let ? l->let.count : 0, (float)l->recipe->let_lr * batch}};
  if (factors) l->k->sigmoid_backward(l->k, l->gradient, l->gradient, l->lwc.parameter, factors);
  if (of[0].count + of[1].count) l->k->adamw(l->k, of, l->m + first, l->v + first, l->gradient + first, l->state);
}

static void update(struct learner *l, int step, int steps) {
  bool signs = l->recipe->lwc && l->recipe->optimizer == OPTIMIZER_SIGN;
  float rate = (float)(l->recipe->sign_span * (1 - (double)step / steps) / steps);
  l->k->step_begin(l->k, l->state, l->gradient, l->count + 1);
  if (signs) l->k->sign_step(l->k, l->lwc.parameter, l->gradient, 2 * l->lwc.groups, rate, l->state);
  update_by_adamw(l, l->recipe->scale_lr ? (float)l->recipe->batch : 1);
  if (l->recipe->lwc) lwc_update_factors(&l->lwc);
  if (l->recipe->let) let_limit(&l->let);
}

/* An epoch's, on their way. */
static void ask_losses(struct learner *l, int epoch) {
  size_t first = (size_t)epoch * (size_t)l->shard->steps, bytes = (size_t)l->shard->steps * sizeof(float);
  struct lane *lane = l->log.lane[epoch % 2];
  if (!lane) {
    l->k->download(l->k, l->log.at + first, l->step_loss + first, bytes);
    return;
  }
  l->k->follow(l->k, lane);
  l->k->send(l->k, lane, l->log.at + first, l->step_loss + first, bytes);
}

/* Mean loss of an epoch's samples, from the sums of its steps. */
static void close_epoch(struct learner *l, int index, int epoch) {
  const float *loss = l->log.at + (size_t)epoch * (size_t)l->shard->steps;
  struct lane *lane = l->log.lane[epoch % 2];
  double total = 0;
  if (lane) l->k->idle(l->k, lane, true);
  for (int i = 0; i < l->shard->steps; i++) total += loss[i];
  l->epoch_loss[epoch] = (float)(total / l->shard->samples);
  progress_epoch(l->progress, index, epoch + 1, l->recipe->epochs, l->epoch_loss[epoch]);
}

void learner_start(struct learner *l) {
  int64_t factors = 2 * l->lwc.groups;
  if (l->recipe->let) let_start(&l->let, l->block, l->target->statistics);
  let_fold(&l->let, l->block, in_training(l).let);
  if (searches(l))
    search(l);
  else
    lwc_start(&l->lwc);
  l->k->copy(l->k, l->start, l->lwc.factor, (size_t)factors * sizeof(float));
  if (l->recipe->let) l->k->copy(l->k, l->start + factors, l->let.parameter, (size_t)l->let.count * sizeof(float));
}

void learner_begin(struct learner *l) {
  size_t bytes = (size_t)l->count * sizeof(float);
  l->k->clear(l->k, l->m, bytes);
  l->k->clear(l->k, l->v, bytes);
  l->k->clear(l->k, l->state, sizeof *l->state);
  memset(l->block->expert_tokens, 0, (size_t)l->block->model->experts * sizeof *l->block->expert_tokens);
}

static void quantize_in_training(void *context) {
  struct learner *l = context;
  learner_quantize(l, in_training(l), l->recipe->stored_scale);
}

void learner_step(struct learner *l, int step, int steps) {
  int in_epoch = step % l->shard->steps;
  struct step_context context = {.learner = l, .weight = 1.0f / (float)shard_step_samples(l->shard, in_epoch)};
  let_expect(&l->let, in_training(l).let); /* quantize_in_training may be repeated without being called */
  if (repeats(l))
    l->k->repeat(l->k, &l->quantizing, quantize_in_training, l);
  else
    quantize_in_training(l);
  l->k->bf16_products = l->recipe->bf16_products;
  struct step_sum sum = {sample_gradient, &context, l->k, l->world, l->gradient, l->scratch, .count = l->count + 1};
  if (l->sums) sum.begin = begin_gradient, sum.rest = finish_gradient, sum.early = l->lwc.early, sum.lane = l->sums;
  shard_step_sum(l->shard, in_epoch, &sum);
  l->k->bf16_products = false;
  l->k->copy(l->k, l->step_loss + step, l->gradient + l->count, sizeof(float));
  update(l, step, steps);
}

/* Whether the ranks take another step. Before it they send a piece of the next block on, where all are ready: what goes between devices has to be asked
 * for in one order on all ranks. */
static bool goes_on(struct learner *l) {
  poll(l);
  bool ready = l->stream && stream_ready(l->stream, l->world);
  if (world_stops(l->world, &ready)) return false;
  if (ready) stream_send(l->stream);
  return true;
}

static void train(struct learner *l, int index) {
  int steps = l->recipe->epochs * l->shard->steps, asked = 0, closed = 0;
  int behind = l->log.lane[0] ? 1 : 0; /* epochs that the host looks at later, so that it need not wait */
  learner_begin(l);
  for (int step = 0; step < steps && goes_on(l); step++) {
    learner_step(l, step, steps);
    if ((step + 1) % l->shard->steps == 0) ask_losses(l, asked++);
    if (closed < asked - behind) close_epoch(l, index, closed++);
  }
  while (closed < asked) close_epoch(l, index, closed++);
}

/* Experts that no rank sent a token to learned nothing, not even that their start is good: they are rounded to nearest. */
static int round_untrained_experts(struct learner *l) {
  int untrained = 0;
  for (int e = 0; e < l->block->model->experts; e++) {
    if (world_sum(l->world, (double)l->block->expert_tokens[e]) > 0) continue;
    untrained++;
    for (enum linear_role role = LINEAR_GATE; role <= LINEAR_DOWN; role++) {
      lwc_round(&l->lwc, linear_of_expert(role, e), l->lwc.factor);
      lwc_round(&l->lwc, linear_of_expert(role, e), l->start);
    }
  }
  return untrained;
}

/* ---- one block ---- */

static bool better(double loss, double than) {
  return isfinite(loss) && !(loss > than); /* a loss that is not finite never wins, and loses against any that is */
}

static void choose(struct outcome *outcome) {
  outcome->kept = KEPT_RTN;
  for (int i = KEPT_START; i <= KEPT_END; i++)
    if (better(outcome->loss[i], outcome->loss[outcome->kept])) outcome->kept = (enum kept)i;
}

struct learned learner_result(const struct learner *l, const struct outcome *outcome) {
  if (outcome->kept == KEPT_RTN) return (struct learned){NULL, NULL};
  return outcome->kept == KEPT_START ? at_start(l) : in_training(l);
}

static void learn(struct learner *l, int index, struct outcome *outcome) {
  struct step_state state;
  timing_enter(l->timing, PHASE_START);
  learner_start(l);
  timing_enter(l->timing, PHASE_MEASURE);
  outcome->loss[KEPT_RTN] = measure(l, (struct learned){NULL, NULL});
  outcome->loss[KEPT_START] = measure(l, at_start(l));
  timing_enter(l->timing, PHASE_STEPS);
  train(l, index);
  outcome->untrained_experts = round_untrained_experts(l);
  timing_enter(l->timing, PHASE_MEASURE);
  outcome->loss[KEPT_END] = measure(l, in_training(l));
  l->k->download(l->k, &state, l->state, sizeof state);
  outcome->skipped = state.skipped;
  choose(outcome);
}

int learner_run(struct learner *l, int index, struct outcome *outcome, struct error *error) {
  *outcome = (struct outcome){.loss = {NAN, NAN, NAN}, .kept = KEPT_RTN};
  l->block->quantizer = l->recipe->activations;
  timing_enter(l->timing, PHASE_TARGET);
  if (searches(l) || l->recipe->aug_loss) observe_pass(l);
  if (learns(l)) learn(l, index, outcome);
  timing_enter(l->timing, PHASE_MEASURE);
  if (outcome->kept != KEPT_END) outcome->loss[outcome->kept] = measure(l, learner_result(l, outcome));
  struct samples before = l->x_q; /* the last measured was what is kept: `next` is its output */
  l->x_q = l->next;
  l->next = before;
  return l->k->synchronize(l->k, error);
}

static void pass(struct learner *l, enum block_weights which) {
  for (int i = 0; i < l->shard->count && !world_stopping(l->world); i++) {
    data *x = samples_change(&l->x_q, i);
    block_forward(l->block, which, x, x);
    poll(l);
  }
}

void learner_pass(struct learner *l) {
  pass(l, BLOCK_FULL);
}

void learner_replay(struct learner *l) {
  l->block->quantizer = l->recipe->activations;
  pass(l, BLOCK_QUANTIZED);
}
