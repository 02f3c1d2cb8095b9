/* learn.c: target, start, steps, and the choice of the best. */
#include "learn.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The activations that linear layers read, by one of the layers that reads each. */
static const enum linear_role activation_reader[] = {LINEAR_Q, LINEAR_O, LINEAR_GATE, LINEAR_DOWN};
enum { ACTIVATIONS = sizeof activation_reader / sizeof *activation_reader };

/* ---- memory ---- */

static int64_t sample_elements(const struct learner *l) {
  return (int64_t)l->block->tokens * l->block->model->hidden;
}

static data *sample_at(const struct learner *l, data *samples, int local) {
  return data_at(l->k, samples, local * sample_elements(l));
}

static int64_t importance_columns(const struct learner *l) {
  int64_t columns = 0;
  for (int i = 0; i < ACTIVATIONS; i++) columns += l->block->model->linear[activation_reader[i]].columns;
  return columns;
}

int learner_init(struct learner *l, struct error *error) {
  struct kernels *k = l->k;
  size_t factors = 2 * (size_t)l->lwc->groups, depth = (size_t)shard_sum_depth(l->shard), columns = (size_t)importance_columns(l);
  size_t summed = factors + 1 > columns ? factors + 1 : columns, steps = (size_t)l->recipe->epochs * (size_t)l->shard->steps;
  struct {
    void *field;
    size_t bytes;
  } device[] = {
      {&l->y, (size_t)sample_elements(l) * k->element_bytes},
      {&l->dy, (size_t)sample_elements(l) * k->element_bytes},
      {&l->gradient, (factors + 1) * sizeof(float)},
      {&l->scratch, depth * summed * sizeof(float)},
      {&l->m, factors * sizeof(float)},
      {&l->v, factors * sizeof(float)},
      {&l->start, factors * sizeof(float)},
      {&l->importance, 2 * columns * sizeof(float)},
      {&l->step_loss, steps * sizeof(float)},
      {&l->sample_loss, (size_t)l->shard->count * sizeof(float)},
      {&l->state, sizeof *l->state},
  };
  bool whole = true;
  for (size_t i = 0; i < sizeof device / sizeof *device; i++) {
    void *memory = k->allocate(k, device[i].bytes);
    memcpy(device[i].field, &memory, sizeof memory);
    whole = whole && memory;
  }
  l->losses = calloc(2 * (size_t)l->shard->samples + steps, sizeof(float));
  l->epoch_loss = calloc((size_t)l->recipe->epochs + 1, sizeof(float));
  if (!whole || !l->losses || !l->epoch_loss) return error_set(error, ERROR_WORK, "out of memory on %s for learning", k->name);
  return 0;
}

void learner_free(struct learner *l) {
  void *const device[] = {l->y,     l->dy,         l->gradient,  l->scratch,     l->m,    l->v,
                          l->start, l->importance, l->step_loss, l->sample_loss, l->state};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    if (device[i]) l->k->release(l->k, device[i]);
  free(l->losses);
  free(l->epoch_loss);
}

static void poll(struct learner *l) {
  if (l->stream) stream_poll(l->stream);
}

/* ---- forward passes over all samples ---- */

static void target_pass(struct learner *l) {
  for (int i = 0; i < l->shard->count; i++) {
    data *x = sample_at(l, l->samples->x_fp, i);
    block_forward(l->block, BLOCK_FULL, x, x);
    poll(l);
  }
}

/* Loss of a sample's output y: method.md section 2, step 2. */
static void sample_loss(struct learner *l, float *loss, data *dy, int local, float weight) {
  l->k->mse(l->k, loss, dy, l->y, sample_at(l, l->samples->x_fp, local), sample_elements(l), weight, false);
  if (l->recipe->aug_loss) l->k->mse(l->k, loss, dy, l->y, sample_at(l, l->samples->target, local), sample_elements(l), weight, true);
}

/* Mean loss over all samples with the weights at rest; `propagate`: x_q becomes the block's output. Collective. */
static double measure(struct learner *l, const float *factor, bool propagate) {
  struct kernels *k = l->k;
  int samples = l->shard->samples, count = l->shard->count;
  lwc_quantize(l->lwc, l->block, factor, true);
  for (int i = 0; i < count; i++) {
    data *x = sample_at(l, l->samples->x_q, i);
    block_forward(l->block, BLOCK_QUANTIZED, l->y, x);
    sample_loss(l, l->sample_loss + i, NULL, i, 1);
    if (propagate) k->copy(k, x, l->y, (size_t)sample_elements(l) * k->element_bytes);
    poll(l);
  }
  float *mine = l->losses + samples; /* gathered by a sum in which every sample has one rank's value */
  memset(l->losses, 0, (size_t)samples * sizeof(float));
  k->download(k, mine, l->sample_loss, (size_t)count * sizeof(float));
  for (int i = 0; i < count; i++) l->losses[shard_sample(l->shard, i)] = mine[i];
  world_allreduce(l->world, l->losses, (size_t)samples, mine);
  double total = 0;
  for (int i = 0; i < samples; i++) total += l->losses[i];
  return total / samples;
}

/* One sample through the full-precision block on the quantized stream: the second target, and the columns' sums of squares. */
static void observe_sample(void *context, int local, float *out) {
  struct learner *l = context;
  data *y = l->samples->target ? sample_at(l, l->samples->target, local) : l->y;
  block_forward(l->block, BLOCK_FULL, y, sample_at(l, l->samples->x_q, local));
  l->k->clear(l->k, out, (size_t)importance_columns(l) * sizeof(float));
  for (int i = 0; i < ACTIVATIONS; i++) {
    int64_t columns = l->block->model->linear[activation_reader[i]].columns;
    l->k->column_squares(l->k, out, block_input_of(l->block, activation_reader[i]), l->block->tokens, columns);
    out += columns;
  }
  poll(l);
}

static void observe_pass(struct learner *l) {
  int64_t columns = importance_columns(l);
  float *step = l->importance + columns;
  l->k->clear(l->k, l->importance, (size_t)columns * sizeof(float));
  for (int i = 0; i < l->shard->steps; i++) {
    shard_step_sum(l->shard, i, observe_sample, l, l->k, l->world, step, l->scratch, columns);
    l->k->add(l->k, l->importance, step, columns);
  }
}

static void search(struct learner *l) {
  const float *importance[LINEARS], *columns = l->importance;
  const float *of_activation[ACTIVATIONS];
  for (int i = 0; i < ACTIVATIONS; i++) {
    of_activation[i] = columns;
    columns += l->block->model->linear[activation_reader[i]].columns;
  }
  for (int role = 0; role < LINEARS; role++)
    for (int i = 0; i < ACTIVATIONS; i++)
      if (block_input_of(l->block, (enum linear_role)role) == block_input_of(l->block, activation_reader[i]))
        importance[role] = of_activation[i];
  lwc_search(l->lwc, l->block, importance, l->world);
}

/* ---- training ---- */

struct step_context {
  struct learner *learner;
  float weight;    /* 1 / samples of the step */
  float *gradient; /* of the sample in work */
};

static void take_weight_gradient(void *context, enum linear_role role, const data *dw) {
  struct step_context *step = context;
  lwc_backward(step->learner->lwc, step->learner->block, role, dw, step->gradient);
}

/* A sample's gradient and loss. */
static void sample_gradient(void *context, int local, float *out) {
  struct step_context *step = context;
  struct learner *l = step->learner;
  const data *x = sample_at(l, l->samples->x_q, local);
  struct gradient_sink sink = {take_weight_gradient, step};
  step->gradient = out;
  block_forward(l->block, BLOCK_QUANTIZED, l->y, x);
  sample_loss(l, out + 2 * l->lwc->groups, l->dy, local, step->weight);
  block_backward(l->block, BLOCK_QUANTIZED, NULL, l->dy, x, &sink);
  poll(l);
}

static void update(struct learner *l, int step, int steps) {
  int64_t count = 2 * l->lwc->groups;
  l->k->step_begin(l->k, l->state, l->gradient, count + 1);
  if (l->recipe->optimizer == OPTIMIZER_SIGN) {
    float lr = (float)(l->recipe->sign_span * (1 - (double)step / steps) / steps);
    l->k->sign_step(l->k, l->lwc->parameter, l->gradient, count, lr, l->state);
  } else {
    double lr = l->recipe->lwc_lr * (l->recipe->scale_lr ? l->recipe->batch : 1);
    l->k->sigmoid_backward(l->k, l->gradient, l->gradient, l->lwc->parameter, count);
    l->k->adamw(l->k, l->lwc->parameter, l->m, l->v, l->gradient, count, (float)lr, l->state);
  }
  lwc_update_factors(l->lwc);
}

/* Mean loss of an epoch's samples, from the sums of its steps. */
static void close_epoch(struct learner *l, int index, int epoch) {
  float *host = l->losses + 2 * (size_t)l->shard->samples;
  double total = 0;
  l->k->download(l->k, host, l->step_loss + (size_t)epoch * (size_t)l->shard->steps, (size_t)l->shard->steps * sizeof(float));
  for (int i = 0; i < l->shard->steps; i++) total += host[i];
  l->epoch_loss[epoch] = (float)(total / l->shard->samples);
  progress_epoch(l->progress, index, epoch + 1, l->recipe->epochs, l->epoch_loss[epoch]);
}

void learner_begin(struct learner *l) {
  size_t bytes = 2 * (size_t)l->lwc->groups * sizeof(float);
  l->k->clear(l->k, l->m, bytes);
  l->k->clear(l->k, l->v, bytes);
  l->k->clear(l->k, l->state, sizeof *l->state);
}

void learner_step(struct learner *l, int step, int steps) {
  int64_t count = 2 * l->lwc->groups;
  int in_epoch = step % l->shard->steps;
  struct step_context context = {.learner = l, .weight = 1.0f / (float)shard_step_samples(l->shard, in_epoch)};
  lwc_quantize(l->lwc, l->block, l->lwc->factor, l->lwc->stored_scale);
  l->k->bf16_products = l->recipe->bf16_products;
  shard_step_sum(l->shard, in_epoch, sample_gradient, &context, l->k, l->world, l->gradient, l->scratch, count + 1);
  l->k->bf16_products = false;
  l->k->copy(l->k, l->step_loss + step, l->gradient + count, sizeof(float));
  update(l, step, steps);
}

static void train(struct learner *l, int index) {
  int steps = l->recipe->epochs * l->shard->steps;
  learner_begin(l);
  for (int step = 0; step < steps; step++) {
    learner_step(l, step, steps);
    if ((step + 1) % l->shard->steps == 0) close_epoch(l, index, step / l->shard->steps);
  }
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

const float *learner_factors(const struct learner *l, const struct outcome *outcome) {
  return outcome->kept == KEPT_RTN ? NULL : outcome->kept == KEPT_START ? l->start : l->lwc->factor;
}

int learner_run(struct learner *l, int index, struct outcome *outcome, struct error *error) {
  struct kernels *k = l->k;
  struct step_state state = {0};
  bool learns = l->recipe->lwc && l->recipe->epochs > 0;
  bool searches = l->recipe->lwc && l->recipe->lwc_init == LWC_INIT_SEARCH;
  *outcome = (struct outcome){.loss = {NAN, NAN, NAN}, .kept = KEPT_RTN};
  if (searches || l->recipe->aug_loss) observe_pass(l);
  target_pass(l);
  if (learns) {
    if (searches)
      search(l);
    else
      lwc_start(l->lwc);
    k->copy(k, l->start, l->lwc->factor, 2 * (size_t)l->lwc->groups * sizeof(float));
    outcome->loss[KEPT_RTN] = measure(l, NULL, false);
    outcome->loss[KEPT_START] = measure(l, l->start, false);
    train(l, index);
    outcome->loss[KEPT_END] = measure(l, l->lwc->factor, false);
    k->download(k, &state, l->state, sizeof state);
    outcome->skipped = state.skipped;
    choose(outcome);
  }
  outcome->loss[outcome->kept] = measure(l, learner_factors(l, outcome), true);
  return k->synchronize(k, error);
}

void learner_pass(struct learner *l) {
  target_pass(l);
  for (int i = 0; i < l->shard->count; i++) {
    data *x = sample_at(l, l->samples->x_q, i);
    block_forward(l->block, BLOCK_FULL, x, x);
    poll(l);
  }
}
