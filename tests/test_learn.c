/* test_learn.c: what learning must hold whatever it is given: steps that are not finite are skipped, no block ends worse than it began, scales
 * stay in their range. LET's start by its formula. Experts: only the rows of their tokens are computed, and one without tokens is rounded. */
#include "fixture.h"
#include "learn.h"
#include "record.h"
#include "same_store.h"

/* A learner over the recipe's samples, block TRAINED of a model loaded. */
struct setup {
  struct memory memory;
  struct fixture f;
  struct kernels *k;
  struct recipe recipe;
  struct rank rank;
};

static struct recipe small_recipe(int samples) {
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.wbits = 3;
  recipe.group_size = 32;
  recipe.epochs = 3;
  recipe.batch = 2 < samples ? 2 : samples;
  recipe.samples = samples;
  recipe.seqlen = TOKENS;
  return recipe;
}

static void setup_open(struct setup *s, const char *folder, const struct recipe *recipe) {
  struct error error = {0};
  struct kernels *k = kernels_open("cpu", 1, 0, &error);
  *s = (struct setup){.memory = {.k = k}, .k = k, .recipe = *recipe};
  fixture_open(&s->f, folder, "expected.safetensors");
  open_rank(&s->rank, &s->f, k, &s->recipe, similar_samples(&s->memory, &s->f, recipe->samples));
}

static void setup_close(struct setup *s) {
  rank_close(&s->rank);
  fixture_close(&s->f);
  memory_free(&s->memory);
  s->k->close(s->k);
}

static struct outcome run(struct setup *s) {
  struct error error = {0};
  struct outcome outcome;
  if (learner_run(&s->rank.learner, 0, &outcome, &error)) fail_msg("%s", error.message);
  return outcome;
}

static void assert_finite(const float *values, int64_t count) {
  for (int64_t i = 0; i < count; i++) assert_true(isfinite(values[i]));
}

/* ---- nothing spoils a block ---- */

/* Sample 3 holds a number too large: each epoch one of three steps is skipped, and what is learned from the others is finite. */
static void a_step_that_is_not_finite_is_skipped(void **context) {
  (void)context;
  for (int let = 0; let < 2; let++) {
    struct setup s;
    struct recipe recipe = small_recipe(6);
    recipe.let = let;
    setup_open(&s, "llama_gqa_tied", &recipe);
    target_pass(&s.rank.target, true);
    int64_t n = hidden_count(&s.f);
    float *sample = fetched_data(&s.memory, samples_change(&s.rank.learner.x_q, 3), n);
    sample[17] = INFINITY;
    s.k->load(s.k, samples_change(&s.rank.learner.x_q, 3), sample, DTYPE_F32, n);
    learner_start(&s.rank.learner);
    learner_begin(&s.rank.learner);
    for (int step = 0; step < 9; step++) learner_step(&s.rank.learner, step, 9);
    struct step_state state;
    s.k->download(s.k, &state, s.rank.learner.state, sizeof state);
    assert_int_equal(state.skipped, 3);
    assert_int_equal(state.taken, 6);
    const float *factor = fetched_floats(&s.memory, s.rank.learner.lwc.factor, 2 * s.rank.learner.lwc.groups);
    assert_finite(factor, 2 * s.rank.learner.lwc.groups);
    assert_memory_not_equal(factor, fetched_floats(&s.memory, s.rank.learner.start, 2 * s.rank.learner.lwc.groups), sizeof(float) * 64);
    if (let) assert_finite(fetched_floats(&s.memory, s.rank.learner.let.parameter, s.rank.learner.let.count), s.rank.learner.let.count);
    setup_close(&s);
  }
}

/* A learning rate that throws everything about: the best of the three is kept, and s stays in its range. */
static void no_block_ends_worse_than_it_began(void **context) {
  (void)context;
  static const char *const models[] = {"llama_mha", "opt", "falcon_40b", "mixtral"};
  for (int i = 0; i < 4; i++) {
    struct setup s;
    struct recipe recipe = small_recipe(4);
    recipe.let = true;
    recipe.let_up = strncmp(models[i], "falcon", 6) != 0;
    recipe.lwc_lr = 50;
    recipe.let_lr = 50;
    recipe.activations.abits = 4;
    setup_open(&s, models[i], &recipe);
    target_pass(&s.rank.target, true);
    struct outcome outcome = run(&s);
    for (int j = 0; j < 3; j++) assert_false(outcome.loss[outcome.kept] > outcome.loss[j]);
    assert_true(isfinite(outcome.loss[outcome.kept]));
    assert_int_not_equal(outcome.kept, KEPT_END); /* that it was thrown about */
    const float *parameter = fetched_floats(&s.memory, s.rank.learner.let.parameter, s.rank.learner.let.count);
    float low = INFINITY, high = 0;
    for (int64_t c = 0; c < s.rank.learner.let.scales; c++) {
      low = fminf(low, parameter[c]);
      high = fmaxf(high, parameter[c]);
    }
    assert_true(low == 1e-2f && high > 10 && high <= 1e4f);
    assert_finite(parameter, s.rank.learner.let.count);
    assert_finite(fetched_data(&s.memory, s.rank.learner.x_q.all, 4 * hidden_count(&s.f)), 4 * hidden_count(&s.f));
    setup_close(&s);
  }
}

/* Nothing but numbers that are not finite: rounded to nearest, and the run goes on. */
static void a_stream_of_nan_is_rounded_to_nearest(void **context) {
  (void)context;
  struct setup s;
  struct recipe recipe = small_recipe(2);
  setup_open(&s, "qwen2", &recipe);
  target_pass(&s.rank.target, true);
  s.k->load(s.k, s.rank.learner.x_q.all, poison(&s.memory, 2 * hidden_count(&s.f)), DTYPE_F32, 2 * hidden_count(&s.f));
  struct outcome outcome = run(&s);
  assert_int_equal(outcome.kept, KEPT_RTN);
  assert_int_equal(outcome.skipped, 3);
  assert_finite(fetched_floats(&s.memory, s.rank.learner.lwc.factor, 2 * s.rank.learner.lwc.groups), 2 * s.rank.learner.lwc.groups);
  setup_close(&s);
}

/* ---- records ---- */

/* Three rows at a time or all at once; in Falcon parts of one tensor. */
static void codes_come_in_panels(void **context) {
  (void)context;
  static const char *const models[] = {"llama_mha", "falcon_40b"};
  for (int i = 0; i < 4; i++) {
    struct setup s;
    struct error error = {0};
    struct record_room *room = &s.rank.room, other;
    struct block_record whole, panels;
    struct recipe recipe = small_recipe(2);
    recipe.let = i % 2;
    recipe.let_up = false;
    recipe.wbits = 3;
    setup_open(&s, models[i / 2], &recipe);
    target_pass(&s.rank.target, true);
    struct outcome outcome = run(&s);
    outcome.kept = KEPT_END; /* with factors, whatever was best */
    if (record_room_init(&other, &s.rank.learner, &error)) fail_msg("%s", error.message);
    if (record_block(&whole, room, &s.rank.learner, 0, &outcome, &error)) fail_msg("%s", error.message);
    other.panel = 3 * s.f.model.hidden + 1;
    if (record_block(&panels, &other, &s.rank.learner, 0, &outcome, &error)) fail_msg("%s", error.message);
    assert_true(same_record(&whole, &panels));
    block_record_free(&whole);
    block_record_free(&panels);
    record_room_free(&other);
    setup_close(&s);
  }
}

/* ---- LET's start ---- */

/* Columns of a matrix on the host. */
static float column_absmax(const float *x, int64_t rows, int64_t columns, int64_t c) {
  float most = 0;
  for (int64_t r = 0; r < rows; r++) most = fmaxf(most, fabsf(x[r * columns + c]));
  return most;
}

/* OPT, one batch of samples at a time, by method.md section 3: the largest activation over all samples, q_proj's columns, the running middle. */
static void let_starts_by_its_formula(void **context) {
  (void)context;
  struct setup s;
  struct recipe recipe = small_recipe(5);
  recipe.let = true;
  recipe.alpha = 0.75;
  recipe.activations.abits = 4;
  setup_open(&s, "opt", &recipe);
  struct memory *m = &s.memory;
  int64_t H = s.f.model.hidden, n = hidden_count(&s.f);
  const struct linear *q = &s.f.model.linear[LINEAR_Q];
  float *absmax = host_floats(m, H), *middle = host_floats(m, H);
  data *y = poisoned_data(m, n);
  for (int i = 0; i < 5; i++) {
    int64_t rows;
    block_forward(&s.rank.block, BLOCK_FULL, y, samples_read(&s.rank.target.x, i));
    const float *x = fetched_data(m, block_input(&s.rank.block, LINEAR_Q, &rows), n);
    assert_int_equal(rows, TOKENS);
    for (int64_t c = 0; c < H; c++) {
      float low = x[c], high = x[c];
      for (int t = 1; t < TOKENS; t++) {
        low = fminf(low, x[t * H + c]);
        high = fmaxf(high, x[t * H + c]);
      }
      absmax[c] = fmaxf(absmax[c], column_absmax(x, TOKENS, H, c));
      middle[c] = i == 0 ? (low + high) / 2 : 0.99f * middle[c] + 0.01f * (low + high) / 2;
    }
  }
  target_pass(&s.rank.target, true);
  learner_start(&s.rank.learner);
  const float *w = fetched_data(m, block_tensor(&s.rank.block, BLOCK_FULL, q->weight), q->rows * q->columns);
  const float *got = fetched_floats(m, s.rank.learner.let.parameter, s.rank.learner.let.count);
  const float *start_s = got + s.rank.learner.let.s[LET_ATTENTION_NORM], *delta = got + s.rank.learner.let.delta[LET_ATTENTION_NORM];
  for (int64_t c = 0; c < H; c++) {
    double want = pow(absmax[c], 0.75) / pow(column_absmax(w, q->rows, H, c), 0.25);
    assert_true(fabs(start_s[c] - want) < 1e-5 * want);
    assert_true(fabsf(delta[c] - middle[c]) < 1e-5f);
  }
  for (int64_t i = 0; i < s.rank.learner.let.channels[LET_QUERY_KEY]; i++) assert_true(got[s.rank.learner.let.s[LET_QUERY_KEY] + i] == 1);
  setup_close(&s);
}

/* ---- experts ---- */

struct count {
  double experts; /* multiplications and additions of products that have the experts' width or are the router's */
  int ffn, experts_count, tokens, hidden;
};

static void count_product(void *context, const struct product *p) {
  struct count *count = context;
  int64_t size[3] = {p->m, p->n, p->k};
  bool inner = false, experts = false, tokens = false, hidden = false;
  for (int i = 0; i < 3; i++) {
    inner = inner || size[i] == count->ffn;
    experts = experts || size[i] == count->experts_count;
    tokens = tokens || size[i] == count->tokens;
    hidden = hidden || size[i] == count->hidden;
  }
  if (inner || (experts && tokens && hidden)) count->experts += 2.0 * (double)p->m * (double)p->n * (double)p->k;
}

/* Forward: three products of an expert's width a token and expert; backward: twice that. */
static void experts_compute_only_their_tokens(void **context) {
  (void)context;
  struct setup s;
  struct recipe recipe = small_recipe(2);
  setup_open(&s, "mixtral", &recipe);
  const struct model *model = &s.f.model;
  struct count count = {0, model->ffn, model->experts, TOKENS, model->hidden};
  target_pass(&s.rank.target, true);
  learner_start(&s.rank.learner);
  learner_quantize(&s.rank.learner, (struct learned){s.rank.learner.lwc.factor, NULL}, true);
  s.k->state->observer = count_product;
  s.k->state->observer_context = &count;
  block_forward(&s.rank.block, BLOCK_QUANTIZED, s.rank.learner.y, samples_read(&s.rank.learner.x_q, 0));
  double needed = 2.0 * 3 * TOKENS * model->experts_per_token * model->hidden * model->ffn, forward = count.experts;
  learner_backward(&s.rank.learner, SAMPLE_WHOLE, s.rank.learner.gradient, s.rank.learner.y, samples_read(&s.rank.learner.x_q, 0));
  s.k->state->observer = NULL;
  print_message("    routed computation over that of the chosen experts: forward %.3f, with backward %.3f\n", forward / needed,
                count.experts / (3 * needed));
  assert_true(forward >= needed && forward <= 1.3 * needed);
  assert_true(count.experts >= 3 * needed && count.experts <= 1.3 * 3 * needed);
  int64_t tokens = 0;
  for (int e = 0; e < model->experts; e++) tokens += s.rank.block.expert_tokens[e];
  assert_int_equal(tokens, TOKENS * model->experts_per_token);
  setup_close(&s);
}

/* One short sample leaves some experts without tokens: their factors are 1, those of the others are what training made of them. */
static void an_expert_without_tokens_is_rounded_to_nearest(void **context) {
  (void)context;
  struct setup s;
  struct recipe recipe = small_recipe(1);
  recipe.let = true;
  setup_open(&s, "mixtral", &recipe);
  target_pass(&s.rank.target, true);
  struct outcome outcome = run(&s);
  const float *factor = fetched_floats(&s.memory, s.rank.learner.lwc.factor, 2 * s.rank.learner.lwc.groups);
  int without = 0;
  for (int e = 0; e < s.f.model.experts; e++) {
    int down = linear_of_expert(LINEAR_DOWN, e);
    const float *hi = factor + s.rank.learner.lwc.first[down];
    without += s.rank.block.expert_tokens[e] == 0;
    for (int64_t g = 0; g < groups_of(&s.rank.learner.lwc.shape[down]); g++) assert_int_equal(hi[g] == 1, hi[0] == 1);
  }
  int rounded = 0;
  for (int e = 0; e < s.f.model.experts; e++) rounded += factor[s.rank.learner.lwc.first[linear_of_expert(LINEAR_UP, e)]] == 1;
  print_message("    %d of %d experts without tokens\n", outcome.untrained_experts, s.f.model.experts);
  assert_int_equal(outcome.untrained_experts, rounded);
  assert_in_range(outcome.untrained_experts, 1, s.f.model.experts - 1);
  assert_true(without <= outcome.untrained_experts);
  setup_close(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_step_that_is_not_finite_is_skipped),
      cmocka_unit_test(no_block_ends_worse_than_it_began),
      cmocka_unit_test(a_stream_of_nan_is_rounded_to_nearest),
      cmocka_unit_test(codes_come_in_panels),
      cmocka_unit_test(let_starts_by_its_formula),
      cmocka_unit_test(experts_compute_only_their_tokens),
      cmocka_unit_test(an_expert_without_tokens_is_rounded_to_nearest),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
