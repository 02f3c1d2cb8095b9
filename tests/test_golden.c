/* test_golden.c: six calibrations by the OmniQuant authors' code (fixtures/golden/README.md), done again with this program's learner: every
 * step of both blocks, the parameters and the logits, each as far as another order of summation leaves them the same. Their scales stay
 * fp32; with scales of fp16, as they are stored here, a few codes of block 0 come out otherwise, and what follows agrees in the mean. */
#include "checkpoint.h"
#include "compare.h"
#include "learn.h"

enum { SAMPLES = 8, EVAL_SAMPLES = 4, TOKENS = 32, BLOCKS = 2, EPOCHS = 4, TRACED_STEPS = 3 };

/* How well a run can be followed. */
enum kind { LWC, OPT_LET, LLAMA_W4A4, LLAMA_W6A6, KINDS };

/* With quantized activations a value sooner or later falls to the other side of a tie, and AdamW spreads that: `followed` is the least that
 * any level of the CPU and a build with sanitizers give. In step 29 of OPT, two columns of k_proj's row 81 both hold its least weight:
 * one or the other takes the gradient of that end, which leaves the losses as they are but moves two s by 2e-3. */
static const struct golden {
  const char *name, *model;
  enum kind kind;
  int wbits, abits, group_size, batch;
  enum kv_granularity kv_granularity;
  bool aug_loss, let;
  int followed[BLOCKS]; /* steps that agree to rounding, whatever the order of sums */
} goldens[] = {
    {"llama_gqa_w3a16g32_lwc", "model_llama_gqa", LWC, 3, 16, 32, 1, KV_HEAD, false, false, {32, 32}},
    {"llama_w2a16g32_lwc_aug", "model_llama", LWC, 2, 16, 32, 1, KV_HEAD, true, false, {32, 32}},
    {"opt_w3a16g32_lwc", "model_opt", LWC, 3, 16, 32, 1, KV_TOKEN, false, false, {32, 32}},
    {"opt_w4a4_lwc_let_fixed", "model_opt", OPT_LET, 4, 4, 0, 1, KV_TOKEN, false, true, {29, 1}},
    {"llama_w4a4_lwc_let", "model_llama", LLAMA_W4A4, 4, 4, 0, 1, KV_HEAD, false, true, {9, 0}},
    {"llama_w6a6_lwc_let_bs2", "model_llama", LLAMA_W6A6, 6, 6, 0, 2, KV_HEAD, false, true, {5, 0}},
};
enum { GOLDENS = sizeof goldens / sizeof *goldens };

/* What is compared, and how far off it may be. */
enum {
  STATISTICS,
  START,
  GRADIENT,
  GRADIENT_1,
  TIED_GRADIENT,
  PARAMETER,
  FINAL,
  FOLDED,
  STEP_LOSS,
  STEP_LOSS_1,
  EPOCH_LOSS,
  EPOCH_LOSS_1,
  EPOCH_LOSS_AT_REST,
  FULL_LOGITS,
  LOGITS,
  DISTANCE,
  DISTANCE_AT_REST,
  REACHED,
  BOUNDS
};
static const struct {
  const char *what;
  double limit[KINDS]; /* 0: equal, or not compared */
} bound_table[BOUNDS] = {
    [STATISTICS] = {"both blocks: statistics that LET starts from, relative norm", {0, 1e-5, 1e-5, 1e-5}},
    [START] = {"both blocks: first parameters, relative norm", {0, 5e-6, 5e-6, 5e-6}},
    [GRADIENT] = {"block 0: gradients of steps 0 to 2, relative norm", {1e-5, 1e-5, 1e-5, 5e-5}},
    [GRADIENT_1] = {"block 1: gradients of the steps that are followed, relative norm", {1e-5, 1e-5, 0, 0}},
    [TIED_GRADIENT] = {"block 0: gradients of step 0, one s for a rotated pair, relative norm", {0, 1e-5, 1e-5, 5e-5}},
    [PARAMETER] = {"block 0: parameters after steps 0 to 2, absolute", {5e-5, 5e-5, 1e-4, 1e-4}},
    [FINAL] = {"block 0: final parameters, absolute", {5e-5, 5e-3, 0, 0}},
    [FOLDED] = {"block 0: norms and biases as folded, relative norm", {0, 2e-4, 0, 0}},
    [STEP_LOSS] = {"block 0: loss of each step that is followed", {1e-5, 1e-5, 1e-5, 1e-5}},
    [STEP_LOSS_1] = {"block 1: loss of each step that is followed", {1e-5, 1e-5, 0, 0}},
    [EPOCH_LOSS] = {"block 0: loss of each epoch", {1e-5, 1e-5, 5e-2, 5e-2}},
    [EPOCH_LOSS_1] = {"block 1: loss of each epoch", {1e-5, 3e-2, 1e-1, 1e-1}},
    [EPOCH_LOSS_AT_REST] = {"block 1: loss of each epoch, fp16 scales in block 0", {1e-2, 5e-2, 1e-1, 1e-1}},
    [FULL_LOGITS] = {"logits in full precision, relative norm", {1e-5, 0, 0, 0}},
    [LOGITS] = {"quantized logits, relative norm", {1e-5, 2e-1, 0, 0}},
    [DISTANCE] = {"distance of quantized from full-precision logits", {1e-5, 5e-2, 1e-1, 1e-1}},
    [DISTANCE_AT_REST] = {"distance of quantized from full-precision logits, fp16 scales", {1e-2, 5e-2, 1e-1, 1e-1}},
    [REACHED] = {"the loss that learner_run reports, of its output", {1e-6, 1e-6, 1e-6, 1e-6}},
};

/* A calibration in work. */
struct run {
  const struct golden *golden;
  struct bound *bounds;
  const char *where;
  struct memory memory;
  struct kernels *k;
  struct safetensors *expected;
  struct checkpoint *checkpoint;
  struct model model;
  struct model unrotated; /* what untie shows to LET */
  struct recipe recipe;
  struct world world;
  struct shard shard;
  struct block block;
  struct let_statistics statistics;
  struct target target;
  struct learner learner;
  int steps;              /* of a block's training */
  data *eval_fp, *eval_q; /* [EVAL_SAMPLES, T, hidden] */
  bool at_rest;           /* scales rounded to fp16 once a block is trained */
};

static void require(const struct error *error) {
  if (error->code) fail_msg("%s", error->message);
}

static int64_t sample_elements(const struct run *run) {
  return (int64_t)TOKENS * run->model.hidden;
}

static void check(struct run *run, int bound, double error, const char *format, ...) __attribute__((format(printf, 4, 5)));
static void check(struct run *run, int bound, double error, const char *format, ...) {
  char what[200], where[300];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  snprintf(where, sizeof where, "%s, %s, %s", run->golden->name, what, run->where);
  bound_check(&run->bounds[bound], error, where);
}

static void check_vector(struct run *run, int bound, const float *got, int64_t count, const char *name) {
  struct memory m = {.k = run->k};
  const float *want = expected_floats(&m, run->expected, count, "%s", name);
  check(run, bound, norm_error(got, widened(&m, want, count), count), "%s", name);
  memory_free(&m);
}

/* ---- set-up ---- */

static struct recipe recipe_of(const struct golden *golden) {
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.wbits = golden->wbits;
  recipe.group_size = golden->group_size;
  recipe.symmetric = false;
  recipe.activations.abits = golden->abits;
  recipe.activations.kv_granularity = golden->kv_granularity;
  recipe.lwc = true;
  recipe.let = golden->let;
  recipe.let_up = false;
  recipe.alpha = 0.5;
  recipe.let_lr = 5e-3;
  recipe.aug_loss = golden->aug_loss;
  recipe.lwc_init = LWC_INIT_PAPER;
  recipe.optimizer = OPTIMIZER_ADAMW;
  recipe.stored_scale = false; /* their scales are never rounded */
  recipe.epochs = EPOCHS;
  recipe.batch = golden->batch;
  recipe.lwc_lr = 1e-2;
  recipe.scale_lr = false;
  recipe.samples = SAMPLES;
  recipe.seqlen = TOKENS;
  return recipe;
}

static data *embedded(struct run *run, const char *ids_name, int samples) {
  struct error error = {0};
  int64_t count = samples * sample_elements(run);
  float *values = poison(&run->memory, count);
  const int32_t *ids = expected_bytes(&run->memory, run->expected, (size_t)samples * TOKENS * sizeof *ids, ids_name);
  for (int64_t i = 0; i < samples; i++)
    checkpoint_embed(run->checkpoint, ids + i * TOKENS, TOKENS, values + i * sample_elements(run), &error);
  require(&error);
  return device_data(&run->memory, values, count);
}

/* Here the two channels of a pair that is rotated together share one s of q <-> k: with two, what is divided out of q and multiplied into k
 * before the rotation does not cancel after it, and the block would no longer be equivalent. The authors' code gives each channel its own.
 * To follow it step by step, LET is shown a model without rotation; the block has its table of angles by now and rotates as before. */
static void untie(struct run *run) {
  run->unrotated = run->model;
  run->unrotated.rope.theta = 0;
  run->block.model = &run->unrotated;
}

static void open_learner(struct run *run, bool tied) {
  struct error error = {0};
  struct kernels *k = run->k;
  struct block_use use = {.tokens = TOKENS, .effective = true, .quantized_inputs = true, .trained = true};
  shard_init(&run->shard, SAMPLES, run->golden->batch, 0, 1);
  block_init(&run->block, &run->model, k, &use, &error);
  require(&error);
  if (!tied) untie(run);
  let_statistics_init(&run->statistics, &run->model, k, &error);
  require(&error);
  run->target = (struct target){
      .world = &run->world, .k = k, .block = &run->block, .shard = &run->shard, .statistics = run->golden->let ? &run->statistics : NULL};
  target_init(&run->target, &error);
  require(&error);
  run->learner = (struct learner){
      .recipe = &run->recipe, .world = &run->world, .k = k, .block = &run->block, .shard = &run->shard, .target = &run->target};
  learner_init(&run->learner, &error);
  require(&error);
  samples_place(&run->target.x, &error);
  learner_place(&run->learner, &error);
  require(&error);
  k->copy(k, run->target.x.all, embedded(run, "calib_ids", SAMPLES), (size_t)(SAMPLES * sample_elements(run)) * k->element_bytes);
  samples_copy(&run->learner.x_q, &run->target.x);
}

static void run_open(struct run *run, const struct golden *golden, bool tied, struct kernels *k, struct bound *bounds, const char *where) {
  char file[80];
  struct error error = {0};
  *run = (struct run){.golden = golden,
                      .bounds = bounds,
                      .where = where,
                      .memory = {.k = k},
                      .k = k,
                      .recipe = recipe_of(golden),
                      .world = {.size = 1, .local_size = 1},
                      .steps = EPOCHS * SAMPLES / golden->batch};
  snprintf(file, sizeof file, "%s.safetensors", golden->name);
  run->expected = expected_open("golden", file);
  checkpoint_open(fixture_path("golden", golden->model).text, &run->model, &run->checkpoint, &error);
  require(&error);
  open_learner(run, tied);
  run->eval_fp = embedded(run, "eval_ids", EVAL_SAMPLES);
  run->eval_q = embedded(run, "eval_ids", EVAL_SAMPLES);
}

static void run_close(struct run *run) {
  learner_free(&run->learner);
  target_free(&run->target);
  let_statistics_free(&run->statistics);
  block_free(&run->block);
  checkpoint_close(run->checkpoint);
  safetensors_close(run->expected);
  memory_free(&run->memory);
}

static void load_block(struct run *run, int index) {
  struct error error = {0};
  void *image = host(&run->memory, (int64_t)run->model.image_bytes, 1);
  checkpoint_read_block(run->checkpoint, &run->model, index, image, &error);
  require(&error);
  block_load(&run->block, image);
}

/* y = block(x) of `count` samples. */
static void pass(struct run *run, enum block_weights which, data *y, data *x, int count) {
  for (int i = 0; i < count; i++) {
    int64_t at = i * sample_elements(run);
    block_forward(&run->block, which, data_at(run->k, y, at), data_at(run->k, x, at));
  }
}

/* ---- parameters, under the names that they have there ---- */

struct part {
  char name[100];
  int64_t at, count; /* among ours */
  bool paired;       /* ours are one for two of theirs */
};
enum { MOST_PARTS = 2 * (ROLES + LET_PLACES) };

static void add_part(struct part *part, int *parts, int64_t at, int64_t count, const char *name, const char *suffix) {
  struct part *added = &part[*parts];
  if (count == 0) return;
  *added = (struct part){.at = at, .count = count};
  snprintf(added->name, sizeof added->name, "%s%s", name, suffix);
  (*parts)++;
}

static int list_parts(const struct run *run, struct part *part) {
  static const char *const theirs[LET_PLACES] = {"qkv", "fc1", "out", "qkt", "not there"};
  const struct lwc *lwc = &run->learner.lwc;
  const struct let *let = &run->learner.let;
  int parts = 0;
  for (int i = 0; i < run->model.linears; i++) {
    const char *linear = run->model.linear[i].name;
    int64_t groups = groups_of(&lwc->shape[i]);
    add_part(part, &parts, lwc->first[i], groups, linear, ".weight_quantizer.upbound_factor");
    add_part(part, &parts, lwc->first[i] + groups, groups, linear, ".weight_quantizer.lowbound_factor");
  }
  for (int place = 0; place < LET_PLACES; place++) {
    int64_t channels = let->channels[place], first = 2 * lwc->groups;
    add_part(part, &parts, first + let->s[place], channels, theirs[place], "_smooth_scale");
    if (channels) part[parts - 1].paired = place == LET_QUERY_KEY && channels < (int64_t)run->model.kv_heads * run->model.head_size;
    if (let->delta[place] != ABSENT) add_part(part, &parts, first + let->delta[place], channels, theirs[place], "_smooth_shift");
  }
  return parts;
}

/* What theirs come to for a part of ours: of a pair that shares one s, the sum of both gradients. */
static const float *wanted(struct run *run, struct memory *m, const struct part *part, int index, const char *stage) {
  int64_t half = run->model.head_size / 2, count = part->count;
  if (!part->paired) return expected_floats(m, run->expected, count, "block%d/%s/%s", index, stage, part->name);
  const float *theirs = expected_floats(m, run->expected, 2 * count, "block%d/%s/%s", index, stage, part->name);
  float *sums = host_floats(m, count);
  for (int64_t i = 0; i < count; i++) {
    int64_t first = i / half * 2 * half + i % half;
    sums[i] = theirs[first] + theirs[first + half];
  }
  return sums;
}

/* Ours, [learner.count], parameters or their gradient. */
static void check_parts(struct run *run, const float *ours, int index, const char *stage, int bound, bool relative) {
  struct part part[MOST_PARTS];
  int parts = list_parts(run, part);
  for (int i = 0; i < parts; i++) {
    struct memory m = {.k = run->k};
    int64_t count = part[i].count;
    const float *got = ours + part[i].at, *want = wanted(run, &m, &part[i], index, stage);
    double error = relative ? norm_error(got, widened(&m, want, count), count) : absolute_error(got, want, count);
    check(run, bound, error, "block%d/%s/%s", index, stage, part[i].name);
    memory_free(&m);
  }
}

static void check_parameters(struct run *run, int index, const char *stage, int bound, bool relative) {
  struct memory m = {.k = run->k};
  struct learner *l = &run->learner;
  int64_t factors = 2 * l->lwc.groups;
  float *ours = host_floats(&m, l->count);
  run->k->download(run->k, ours, l->lwc.parameter, (size_t)factors * sizeof *ours);
  if (run->golden->let) run->k->download(run->k, ours + factors, l->let.parameter, (size_t)l->let.count * sizeof *ours);
  check_parts(run, ours, index, stage, bound, relative);
  memory_free(&m);
}

/* The gradient of the latest step. */
static void check_gradient(struct run *run, int index, int step, int bound) {
  struct memory m = {.k = run->k};
  char stage[40];
  snprintf(stage, sizeof stage, "step%d_grad", step);
  check_parts(run, fetched_floats(&m, run->learner.gradient, run->learner.count), index, stage, bound, true);
  memory_free(&m);
}

/* ---- step by step ---- */

/* What the linear layers read: act_scale and, where it is not the first parameter of a place, act_shift. */
static void check_statistics(struct run *run, int index) {
  static const enum let_place place_of[ROLES] = {
      [LINEAR_Q] = LET_ATTENTION_NORM, [LINEAR_K] = LET_ATTENTION_NORM, [LINEAR_V] = LET_ATTENTION_NORM, [LINEAR_O] = LET_VALUE,
      [LINEAR_GATE] = LET_MLP_NORM,    [LINEAR_UP] = LET_MLP_NORM,      [LINEAR_DOWN] = LET_UP};
  struct memory m = {.k = run->k};
  const struct let_statistics *s = &run->statistics;
  const float *absmax = fetched_floats(&m, s->absmax, s->count), *middle = fetched_floats(&m, s->middle, s->count);
  for (int i = 0; i < run->model.linears; i++) {
    char prefix[60], name[200];
    const struct linear *linear = &run->model.linear[i];
    if (!linear->quantized) continue;
    snprintf(prefix, sizeof prefix, model_names(&run->model)->block_prefix, index);
    snprintf(name, sizeof name, "act_scale/%s%s", prefix, linear->name);
    check_vector(run, STATISTICS, absmax + s->at[place_of[i]], linear->columns, name);
    snprintf(name, sizeof name, "act_shift/%s%s", prefix, linear->name);
    if (safetensors_find(run->expected, name)) check_vector(run, STATISTICS, middle + s->at[place_of[i]], linear->columns, name);
  }
  memory_free(&m);
}

/* Steps of a block that are to agree with theirs to rounding; of a run with scales at rest that is another test. */
static int followed(const struct run *run, int index) {
  return run->at_rest ? 0 : run->golden->followed[index];
}

/* Whether the last parameters of block 0 are to. */
static bool ends_alike(const struct run *run) {
  return !run->at_rest && run->bounds[FINAL].limit > 0;
}

/* The first `count` of `total` losses. */
static void check_losses(struct run *run, const float *got, const char *name, int index, int total, int count, int bound) {
  struct memory m = {.k = run->k};
  const float *want = expected_floats(&m, run->expected, total, "block%d/%s", index, name);
  for (int i = 0; i < count; i++) check(run, bound, fabs((double)got[i] - want[i]) / want[i], "block%d/%s %d", index, name, i);
  memory_free(&m);
}

/* A step's loss is the mean over its samples there, the sum here. */
static void check_training(struct run *run, int index) {
  struct memory m = {.k = run->k};
  int batch = run->golden->batch, epoch_bound = run->at_rest ? EPOCH_LOSS_AT_REST : EPOCH_LOSS_1;
  float *step = fetched_floats(&m, run->learner.step_loss, run->steps), epoch[EPOCHS] = {0};
  for (int i = 0; i < run->steps; i++) {
    epoch[i * EPOCHS / run->steps] += step[i] / SAMPLES;
    step[i] /= (float)batch;
  }
  check_losses(run, step, "step_loss", index, run->steps, followed(run, index), index ? STEP_LOSS_1 : STEP_LOSS);
  check_losses(run, epoch, "epoch_loss", index, EPOCHS, EPOCHS, index ? epoch_bound : EPOCH_LOSS);
  memory_free(&m);
}

/* Trains a block from the paper's start. */
static void train_block(struct run *run, int index) {
  char stage[40];
  learner_start(&run->learner);
  check_parameters(run, index, "init", START, true);
  learner_begin(&run->learner);
  for (int step = 0; step < run->steps; step++) {
    learner_step(&run->learner, step, run->steps);
    if (step >= followed(run, index) || step >= TRACED_STEPS) continue;
    check_gradient(run, index, step, index ? GRADIENT_1 : GRADIENT);
    snprintf(stage, sizeof stage, "after_step%d", step);
    if (index == 0) check_parameters(run, index, stage, PARAMETER, false);
  }
  if (index == 0 && ends_alike(run)) check_parameters(run, index, "final", FINAL, false);
  check_training(run, index);
}

/* Norms and biases of block 0 after learner_quantize. */
static void check_folded(struct run *run) {
  for (int i = 0; i < run->model.tensors; i++) {
    struct memory m = {.k = run->k};
    const struct block_tensor *tensor = &run->model.tensor[i];
    char name[100];
    if (tensor->dimensions > 1) continue;
    snprintf(name, sizeof name, "block0/quantized/%s", tensor->name);
    check_vector(run, FOLDED, fetched_data(&m, block_tensor(&run->block, BLOCK_QUANTIZED, i), tensor->columns), tensor->columns, name);
    memory_free(&m);
  }
}

/* Logits of the evaluation samples after final norm and head. */
static const float *logits_of(struct run *run, data *x) {
  struct memory *m = &run->memory;
  struct kernels *k = run->k;
  struct error error = {0};
  int64_t H = run->model.hidden, V = run->model.vocabulary, tokens = EVAL_SAMPLES * TOKENS;
  float *norm = poison(m, H), *bias = run->model.layer_norm ? poison(m, H) : NULL, *weight = poison(m, V * H);
  struct norm_shape shape = {tokens, H, run->model.norm_eps, run->model.layer_norm};
  data *logits = poisoned_data(m, tokens * V);
  checkpoint_read_final_norm(run->checkpoint, norm, &error);
  if (bias) checkpoint_read_final_norm_bias(run->checkpoint, bias, &error);
  checkpoint_read_head(run->checkpoint, 0, V, weight, &error);
  require(&error);
  k->norm_forward(k, x, x, device_data(m, norm, H), bias ? device_data(m, bias, H) : NULL, &shape);
  k->linear_forward(k, logits, x, device_data(m, weight, V * H), NULL, tokens, H, V, false);
  return fetched_data(m, logits, tokens * V);
}

static void check_logits(struct run *run) {
  struct memory *m = &run->memory;
  int64_t count = (int64_t)EVAL_SAMPLES * TOKENS * run->model.vocabulary;
  const float *full = logits_of(run, run->eval_fp), *quantized = logits_of(run, run->eval_q);
  double distance = norm_error(quantized, widened(m, full, count), count);
  double want = *expected_floats(m, run->expected, 1, "logit_rel_err");
  if (!run->golden->let) check_vector(run, FULL_LOGITS, full, count, "fp_logits"); /* the models of the others are among these */
  if (followed(run, 1)) check_vector(run, LOGITS, quantized, count, "q_logits");
  check(run, run->at_rest ? DISTANCE_AT_REST : DISTANCE, fabs(distance / want - 1), "logit_rel_err");
}

/* The last parameters. */
static struct learned trained(const struct run *run) {
  return (struct learned){run->learner.lwc.factor, run->golden->let ? run->learner.let.parameter : NULL};
}

/* As the pipeline does it, but that the last parameters are kept even where the start's are better, as the authors do. */
static void calibrate_step_by_step(struct run *run) {
  run->block.quantizer = run->recipe.activations;
  for (int index = 0; index < BLOCKS; index++) {
    load_block(run, index);
    if (run->golden->aug_loss) pass(run, BLOCK_FULL, run->learner.augmented.all, run->learner.x_q.all, SAMPLES);
    target_pass(&run->target, true);
    if (run->golden->let) check_statistics(run, index);
    train_block(run, index);
    learner_quantize(&run->learner, trained(run), run->at_rest);
    if (index == 0 && ends_alike(run)) check_folded(run);
    pass(run, BLOCK_QUANTIZED, run->learner.x_q.all, run->learner.x_q.all, SAMPLES);
    pass(run, BLOCK_QUANTIZED, run->eval_q, run->eval_q, EVAL_SAMPLES);
    pass(run, BLOCK_FULL, run->eval_fp, run->eval_fp, EVAL_SAMPLES);
  }
  check_logits(run);
}

static void calibrate_with_scales_at_rest(struct run *run) {
  run->at_rest = true;
  calibrate_step_by_step(run);
}

/* The first step of a run whose rotated pairs share one s: nothing has moved yet, so that all other gradients are as without.
 * OPT does not rotate: nothing is tied there. */
static void take_a_tied_step(struct run *run) {
  const int64_t *channels = run->learner.let.channels;
  if (run->model.rope.theta > 0) assert_int_equal(2 * channels[LET_QUERY_KEY], channels[LET_VALUE]);
  run->block.quantizer = run->recipe.activations;
  load_block(run, 0);
  target_pass(&run->target, true);
  learner_start(&run->learner);
  learner_begin(&run->learner);
  learner_step(&run->learner, 0, run->steps);
  check_gradient(run, 0, 0, TIED_GRADIENT);
}

/* ---- as a whole ---- */

/* Mean loss over the samples of block 0, where both targets of aug_loss are the same. */
static double loss_of(struct run *run, const float *y) {
  int64_t count = SAMPLES * sample_elements(run);
  const float *target = fetched_data(&run->memory, run->target.x.all, count);
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += ((double)y[i] - target[i]) * ((double)y[i] - target[i]);
  return (run->golden->aug_loss ? 2 : 1) * sum / (double)count;
}

static void check_outcome(struct run *run, const struct outcome *outcome) {
  double kept = outcome->loss[outcome->kept];
  assert_int_equal(outcome->skipped, 0);
  assert_int_equal(outcome->untrained_experts, 0);
  for (int i = KEPT_RTN; i <= KEPT_END; i++) assert_true(isfinite(outcome->loss[i]) && kept <= outcome->loss[i]);
  if (ends_alike(run))
    assert_int_equal(outcome->kept, KEPT_END);
  else
    assert_int_not_equal(outcome->kept, KEPT_RTN); /* the start is as good as the end there */
}

/* learner_run puts the same pieces together: the same losses, the best parameters, and x_q moved on to the next block with them. */
static void calibrate_a_block(struct run *run) {
  struct error error = {0};
  struct outcome outcome;
  struct learner *l = &run->learner;
  int64_t count = SAMPLES * sample_elements(run);
  size_t bytes = (size_t)count * run->k->element_bytes;
  data *y = device(&run->memory, bytes);
  load_block(run, 0);
  run->k->copy(run->k, y, l->x_q.all, bytes);
  target_pass(&run->target, true);
  learner_run(l, 0, &outcome, &error);
  require(&error);
  check_losses(run, l->epoch_loss, "epoch_loss", 0, EPOCHS, EPOCHS, EPOCH_LOSS);
  if (ends_alike(run)) check_parameters(run, 0, "final", FINAL, false);
  check_outcome(run, &outcome);
  learner_quantize(l, learner_result(l, &outcome), true);
  pass(run, BLOCK_QUANTIZED, y, y, SAMPLES);
  const float *moved = fetched_data(&run->memory, l->x_q.all, count);
  assert_memory_equal(moved, fetched_data(&run->memory, y, count), (size_t)count * sizeof *moved);
  check(run, REACHED, fabs(loss_of(run, moved) / outcome.loss[outcome.kept] - 1), "%d", outcome.kept);
}

/* Every run, or those with LET, with 1 thread and up to `most`. */
static void follow(void (*calibrate)(struct run *run), bool tied, int most) {
  for (int i = 0; i < GOLDENS; i++) {
    struct bound bounds[BOUNDS];
    if (tied && !goldens[i].let) continue;
    for (int j = 0; j < BOUNDS; j++) bounds[j] = (struct bound){bound_table[j].what, bound_table[j].limit[goldens[i].kind], -1};
    for (int threads = 1; threads <= most; threads++) {
      struct run run;
      struct error error = {0};
      struct kernels *k = kernels_open("cpu", threads, 0, &error);
      require(&error);
      run_open(&run, &goldens[i], tied, k, bounds, threads == 1 ? "1 thread" : "2 threads");
      calibrate(&run);
      run_close(&run);
      k->close(k);
    }
    print_message("  %s\n", goldens[i].name);
    for (int j = 0; j < BOUNDS; j++)
      if (bounds[j].worst >= 0) bound_print(&bounds[j], 1);
  }
}

static void every_step_follows_the_reference(void **context) {
  (void)context;
  follow(calibrate_step_by_step, false, 2);
}

static void stored_scales_change_little(void **context) {
  (void)context;
  follow(calibrate_with_scales_at_rest, false, 1);
}

static void a_rotated_pair_gets_the_sum_of_both_gradients(void **context) {
  (void)context;
  follow(take_a_tied_step, true, 2);
}

static void a_whole_block_follows_the_reference(void **context) {
  (void)context;
  follow(calibrate_a_block, false, 2);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_step_follows_the_reference),
      cmocka_unit_test(stored_scales_change_little),
      cmocka_unit_test(a_rotated_pair_gets_the_sum_of_both_gradients),
      cmocka_unit_test(a_whole_block_follows_the_reference),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
