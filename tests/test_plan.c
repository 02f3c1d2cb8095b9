/* test_plan.c: a backend that is traced computes what it computes alone; a rehearsal without a backend notes the work of one with it; the work is
 * what formulas say; and what a plan makes of it. */
#include <stdlib.h>

#include "fixture.h"
#include "learn.h"
#include "plan.h"
#include "rehearsal.h"

/* ---- tracing ---- */

/* A block of random activations, learned; the quantized stream behind it. */
static void learn_block(const struct fixture *f, struct kernels *k, const struct recipe *recipe, float *out) {
  struct error error = {0};
  struct memory memory = {.k = k};
  struct rank rank;
  struct outcome outcome;
  int64_t count = SAMPLES * hidden_count(f);
  open_rank(&rank, f, k, recipe, expected_floats(&memory, f->expected, count, "hidden.%d", TRAINED));
  target_pass(&rank.target, true);
  if (learner_run(&rank.learner, 0, &outcome, &error)) fail_msg("%s", error.message);
  k->fetch(k, out, rank.learner.x_q.all, count);
  rank_close(&rank);
  memory_free(&memory);
}

static struct recipe full_recipe(bool let) {
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.wbits = 3;
  recipe.group_size = 32;
  recipe.epochs = 2;
  recipe.samples = SAMPLES;
  recipe.seqlen = TOKENS;
  recipe.let = let;
  recipe.aug_loss = let;
  if (let) recipe.activations.abits = recipe.activations.kv_bits = 8;
  if (!let) recipe.lwc_init = LWC_INIT_SEARCH;
  return recipe;
}

static void test_traced_backend_computes_the_same(void **state) {
  (void)state;
  for (int i = 0; i < FOLDERS; i++) {
    struct error error = {0};
    struct fixture f;
    struct trace trace;
    struct kernels *cpu = kernels_open("cpu", 1, 0, &error), *traced = trace_open(cpu, 0, &trace);
    fixture_open(&f, folders[i], "expected.safetensors");
    struct recipe recipe = full_recipe(i % 2 == 0);
    int64_t count = SAMPLES * hidden_count(&f);
    float *plain = host_floats(&f.memory, count), *through = host_floats(&f.memory, count);
    learn_block(&f, cpu, &recipe, plain);
    learn_block(&f, traced, &recipe, through);
    assert_memory_equal(plain, through, (size_t)count * sizeof *plain);
    assert_true(trace.row[TRACE_linear_forward].seconds > 0 && trace.row[TRACE_linear_forward].flops > 0);
    fixture_close(&f);
    traced->close(traced);
    cpu->close(cpu);
  }
}

static void compare_rows(const char *folder, const struct trace *computed, const struct trace *noted) {
  for (int i = 0; i < TRACE_COUNT; i++) {
    const struct trace_row *a = &computed->row[i], *b = &noted->row[i];
    if (a->calls != b->calls || fabs(a->flops - b->flops) > 1e-9 * a->flops || fabs(a->bytes - b->bytes) > 1e-9 * a->bytes)
      fail_msg("%s: %s: %g calls, %g flops, %g bytes computed, but %g, %g, %g noted", folder, trace_name((enum trace_operation)i), a->calls,
               a->flops, a->bytes, b->calls, b->flops, b->bytes);
  }
  assert_int_equal(computed->allocated, noted->allocated);
}

/* What is noted without computing is what is done: calls, arithmetic, traffic, memory. */
static void test_rehearsal_without_backend(void **state) {
  (void)state;
  for (int i = 0; i < FOLDERS; i++)
    for (int let = 0; let < 2; let++) {
      struct error error = {0};
      struct fixture f;
      struct kernels *cpu = kernels_open("cpu", 1, 0, &error);
      struct rehearsal *computed = malloc(sizeof *computed), *noted = malloc(sizeof *noted);
      struct recipe recipe = full_recipe(let);
      fixture_open(&f, folders[i], "expected.safetensors");
      if (rehearse(computed, &f.model, &recipe, 1, 0, cpu, &error) || rehearse(noted, &f.model, &recipe, 1, 4, NULL, &error))
        fail_msg("%s: %s", folders[i], error.message);
      assert_int_equal(computed->allocated, noted->allocated);
      assert_int_equal(computed->learnables, noted->learnables);
      if (f.model.experts == 0) { /* tokens do not go to experts evenly there */
        compare_rows(folders[i], &computed->step, &noted->step);
        compare_rows(folders[i], &computed->sample, &noted->sample);
        compare_rows(folders[i], &computed->forward, &noted->forward);
      } else {
        assert_true(computed->step.row[TRACE_linear_forward].flops == noted->step.row[TRACE_linear_forward].flops);
        assert_true(computed->forward.row[TRACE_linear_forward].flops == noted->forward.row[TRACE_linear_forward].flops);
      }
      fixture_close(&f);
      free(computed);
      free(noted);
      cpu->close(cpu);
    }
}

/* ---- public models ---- */

/* Parameters as published, the head counted once where it is the embedding; of one block's linear layers by hand: attention and MLP. */
static const struct {
  const char *name;
  double parameters;
  int blocks;
} models[] = {
    {"llama-2-7b", 6738415616.0, 32},        {"llama-2-13b", 13015864320.0, 40},  {"llama-2-70b", 68976648192.0, 80},
    {"llama-3.1-405b", 405853388800.0, 126}, {"mixtral-8x7b", 46702792704.0, 32}, {"mixtral-8x22b", 140620634112.0, 56},
    {"opt-66b", 65719701504.0, 64},          {"falcon-180b", 178557088768.0, 80},
};

static struct plan_options options_of(const char *name, const char *gpu, int ranks) {
  static char path[512];
  snprintf(path, sizeof path, PLANS "/%s", name);
  return (struct plan_options){.model = path, .ranks = ranks, .threads = 1, .gpu = gpu, .backend = "cpu"};
}

static struct plan *make(const struct plan_options *options, const struct recipe *recipe) {
  struct error error = {0};
  struct plan *plan = malloc(sizeof *plan);
  assert_non_null(plan);
  if (plan_make(plan, options, recipe, &error)) fail_msg("%s", error.message);
  return plan;
}

static void test_public_models(void **state) {
  (void)state;
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.wbits = 3;
  recipe.group_size = 128;
  recipe.batch = 8;
  for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
    struct plan_options options = options_of(models[i].name, "h100", 8);
    struct plan *plan = make(&options, &recipe);
    assert_true(plan->parameters == models[i].parameters);
    assert_int_equal(plan->model.blocks, models[i].blocks);
    assert_false(plan->headers);
    assert_true(plan->fits && plan->memory.device < 80e9);
    assert_true(plan->checkpoint_bytes > 1.99 * plan->parameters && plan->checkpoint_bytes < 2.01 * plan->parameters);
    /* 16 of 128 samples a rank, of 2048 tokens, in 2 bytes: the target, and the quantized stream before and behind the block. */
    assert_true(plan->memory.streams == 3.0 * 16 * 2048 * plan->model.hidden * 2);
    free(plan);
  }
}

/* Falcon-180B: on CPUs a node's ranks hold a block between them, on cards each its own; of the largest weight's 3.3 GiB of gradient a part is there. */
static void test_ranks_of_a_node(void **state) {
  (void)state;
  const int ranks = 4;
  const double H = 14848, weights = 4 * ((H + 2 * 8 * 64) * H + H * H + 2 * 4 * H * H + 4 * H);
  struct recipe recipe;
  recipe_init(&recipe);
  recipe.batch = ranks;
  for (int card = 0; card < 2; card++) {
    struct plan_options apart = options_of("falcon-180b", card ? "h100" : NULL, ranks), together = apart;
    apart.ranks_a_node = 1;
    together.ranks_a_node = ranks;
    struct plan *one = make(&apart, &recipe), *all = make(&together, &recipe);
    double grown = all->memory.program - one->memory.program; /* this process itself, whose memory a plan on CPUs looks at */
    assert_true(one->memory.node == one->memory.host);
    assert_true(fabs(all->memory.host - one->memory.host - grown) < 1);
    double spared = ranks * (one->memory.node + grown) - all->memory.node, other_outputs = (ranks - 1) * one->memory.output;
    assert_true(fabs(spared - other_outputs - (card ? 0 : (ranks - 1) * 2 * weights)) < 1);
    assert_true(one->memory.weight_gradient <= BLOCK_PANEL * one->machine.element_bytes);
    assert_true(one->memory.weight_gradient > 0.8 * BLOCK_PANEL * one->machine.element_bytes);
    free(one);
    free(all);
  }
}

/* A step of LLaMA-2-7B by the formulas: T = 2048 tokens, H = 4096, F = 11008, one sample. Nothing learns from q, k and v's inputs. */
static void test_step_of_llama_2_7b(void **state) {
  (void)state;
  struct recipe recipe;
  struct error error = {0};
  struct plan_options options = options_of("llama-2-7b", NULL, 1);
  struct rehearsal *rehearsal = malloc(sizeof *rehearsal);
  assert_non_null(rehearsal);
  recipe_init(&recipe);
  recipe.wbits = 3;
  recipe.group_size = 128;
  struct plan *plan = make(&options, &recipe);
  if (rehearse(rehearsal, &plan->model, &recipe, 1, 2, NULL, &error)) fail_msg("%s", error.message);
  double T = 2048, H = 4096, F = 11008, weights = 4 * H * H + 3 * H * F, pairs = T * (T + 1) / 2;
  const struct trace_row *row = rehearsal->step.row;
  assert_true(row[TRACE_linear_forward].flops == 2 * T * weights);
  assert_true(row[TRACE_linear_backward_weight].flops == 2 * T * weights);
  assert_true(row[TRACE_linear_backward_input].flops == 2 * T * (weights - 3 * H * H));
  assert_true(row[TRACE_attention_forward].flops == 4 * pairs * H);
  assert_true(row[TRACE_attention_backward].flops == 10 * pairs * H);
  assert_true(row[TRACE_quantize_forward].bytes == 2 * 2 * weights); /* read W, write W_hat, in 2 bytes */
  assert_true(rehearsal->learnables == (int64_t)(2 * weights / 128));
  assert_true(plan->gradient_bytes == 4 * (2 * weights / 128 + 1));
  assert_int_equal(plan->steps_a_block, 128 * recipe.epochs);
  free(rehearsal);
  free(plan);
}

/* ---- machines ---- */

static void write_text(const char *path, const char *text) {
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  assert_true(fputs(text, file) >= 0);
  assert_int_equal(fclose(file), 0);
}

static void test_times_by_hand(void **state) {
  (void)state;
  struct machine machine = {.ranks_a_node = 8,
                            .node_latency = 1,
                            .node_bandwidth = 10,
                            .network_latency = 2,
                            .network_bandwidth = 5,
                            .memory_bandwidth = 30,
                            .product_flops = 100,
                            .attention_flops = 50,
                            .call_seconds = 0.5};
  /* 160 bytes: 80, 40, 20 to distances 1, 2, 4 inside the node and 10 to 8 between, and back; four sums of a tenth of three times these. */
  assert_true(fabs(machine_allreduce_seconds(&machine, 16, 160) - (2 * (9 + 5 + 3 + 4) + 15)) < 1e-9);
  assert_true(machine_allreduce_seconds(&machine, 1, 100) == 0);
  struct trace_row product = {.calls = 2, .flops = 1000, .bytes = 60}, copy = {.calls = 2, .bytes = 15};
  assert_true(machine_seconds(&machine, TRACE_linear_forward, &product) == 10);
  assert_true(machine_seconds(&machine, TRACE_attention_forward, &product) == 20);
  assert_true(machine_seconds(&machine, TRACE_copy, &copy) == 1); /* two calls are longer than the bytes */
  machine.measured[TRACE_linear_forward] = (struct trace_row){.calls = 1, .flops = 10, .bytes = 1, .seconds = 3};
  machine.measured[TRACE_copy] = (struct trace_row){.calls = 1, .bytes = 5, .seconds = 2};
  assert_true(machine_seconds(&machine, TRACE_linear_forward, &product) == 300);
  assert_true(machine_seconds(&machine, TRACE_copy, &copy) == 6);
}

/* On CPUs one sum a step, on cards two, the first beside the backward pass of attention, where that is longer; none on one rank. */
static void test_sums_of_a_step(void **state) {
  (void)state;
  struct recipe recipe;
  recipe_init(&recipe);
  for (int card = 0; card < 2; card++)
    for (int ranks = 1; ranks <= 64; ranks *= 8) {
      struct plan_options options = options_of("llama-2-7b", card ? "h100" : NULL, ranks);
      struct plan *plan = make(&options, &recipe);
      double early = machine_allreduce_seconds(&plan->machine, ranks, plan->early_bytes) - plan->beside_seconds,
             late = machine_allreduce_seconds(&plan->machine, ranks, plan->gradient_bytes - plan->early_bytes);
      assert_true(card ? plan->early_bytes > 0 && plan->beside_seconds > 0 : plan->early_bytes == 0 && plan->beside_seconds == 0);
      assert_true(fabs(plan->step[PLAN_ALLREDUCE] - late - (card && early > 0 ? early : 0)) < 1e-12);
      assert_true(ranks > 1 ? late > 0 : late == 0);
      free(plan);
    }
}

static void test_limits(void **state) {
  (void)state;
  const char *path = "machine.json";
  struct recipe recipe;
  recipe_init(&recipe);
  struct plan_options options = options_of("llama-2-70b", "h100", 8);
  options.measured = path;
  write_text(path, "{\"name\": \"slow disk\", \"read_bandwidth\": 1e5}");
  struct plan *plan = make(&options, &recipe);
  assert_string_equal(plan->limit, "reading the checkpoint");
  assert_string_equal(plan->machine.name, "slow disk");
  assert_true(plan->run_seconds > plan->checkpoint_bytes * 0.9 / 1e5);
  free(plan);
  write_text(path, "{\"device_memory\": 5e9}");
  plan = make(&options, &recipe);
  assert_string_equal(plan->limit, "memory of the device");
  assert_false(plan->fits);
  assert_int_equal(plan->largest_batch, 0);
  free(plan);
  /* With sums that cost nothing and batch 16, 16 ranks halve what 8 take, and 32 have nothing to add. */
  write_text(
      path,
      "{\"node_latency\": 0, \"network_latency\": 0, \"node_bandwidth\": 1e30, \"network_bandwidth\": 1e30, \"read_bandwidth\": 1e30, "
      "\"write_bandwidth\": 1e30, \"copy_bandwidth\": 1e30}");
  recipe.batch = 16;
  plan = make(&options, &recipe);
  assert_int_equal(plan->useful_ranks, 16);
  assert_int_equal(plan->largest_batch, 128);
  free(plan);
  remove(path);
}

/* Three arrays of 128 samples, and a card that has room for all, for two or one of them, or for nothing else: the rest waits on the host, but for two
 * samples of each array. */
static void test_streams_find_their_place(void **state) {
  (void)state;
  const char *path = "machine.json";
  char text[80];
  struct recipe recipe;
  recipe_init(&recipe);
  struct plan_options options = options_of("llama-2-7b", "h100", 1);
  struct plan *plan = make(&options, &recipe);
  double array = plan->memory.streams / 3, windows = array / 64, rest = plan->memory.device - plan->memory.streams,
         host = plan->memory.host;
  assert_true(array == 128.0 * 2048 * 4096 * 2 && plan->memory.streams_on_host == 0 && plan->memory.windows == 0);
  free(plan);
  options.measured = path;
  for (int held = 0; held < 3; held++)
    for (int lacking = 0; lacking < 2; lacking++) {
      double device =
          rest + held * array + (held == 0 ? 3 : 3 - (held - 1)) * windows - lacking; /* the last that finds room still has its windows */
      int found = lacking && held > 0 ? held - 1 : held;
      snprintf(text, sizeof text, "{\"device_memory\": %.0f}", device);
      write_text(path, text);
      plan = make(&options, &recipe);
      assert_true(plan->memory.streams_on_host == (3 - found) * array && plan->memory.windows == (3 - found) * windows);
      assert_true(plan->memory.device == rest + found * array + (3 - found) * windows);
      assert_true(plan->memory.host == host + (3 - found) * array);
      assert_int_equal(plan->fits, !(lacking && held == 0));
      free(plan);
    }
  remove(path);
}

static void refused(const char *gpu, const char *measured, const char *message) {
  struct error error = {0};
  struct recipe recipe;
  struct plan_options options = options_of("llama-2-7b", gpu, 1);
  struct plan *plan = malloc(sizeof *plan);
  options.measured = measured;
  recipe_init(&recipe);
  assert_int_equal(plan_make(plan, &options, &recipe, &error), ERROR_INPUT);
  assert_non_null(strstr(error.message, message));
  free(plan);
}

static void test_refusals(void **state) {
  (void)state;
  const char *path = "wrong.json";
  refused("h500", NULL, "'h500' is neither h100, h200, a100 nor a file");
  write_text(path, "{\"read_bandwidth\": ");
  refused(NULL, path, "wrong.json: ");
  write_text(path, "[1, 2]");
  refused(NULL, path, "wrong.json: not a JSON object");
  write_text(path, "{\"read_bandwith\": 1e9}");
  refused(NULL, path, "wrong.json: read_bandwith: no such key");
  write_text(path, "{\"read_bandwidth\": -1}");
  refused(NULL, path, "wrong.json: read_bandwidth: not a number from 0 on");
  write_text(path, "{\"operations\": {\"copy\": {\"seconds\": \"long\"}}}");
  refused(NULL, path, "wrong.json: operations: copy: seconds: not a number from 0 on");
  write_text(path, "{\"element_bytes\": 3}");
  refused(NULL, path, "wrong.json: element_bytes: not 2 or 4");
  write_text(path, "{\"memory_bandwidth\": 0}");
  refused(NULL, path, "wrong.json: memory_bandwidth: not a number above 0");
  remove(path);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_traced_backend_computes_the_same),
      cmocka_unit_test(test_rehearsal_without_backend),
      cmocka_unit_test(test_public_models),
      cmocka_unit_test(test_ranks_of_a_node),
      cmocka_unit_test(test_sums_of_a_step),
      cmocka_unit_test(test_step_of_llama_2_7b),
      cmocka_unit_test(test_times_by_hand),
      cmocka_unit_test(test_limits),
      cmocka_unit_test(test_streams_find_their_place),
      cmocka_unit_test(test_refusals),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
