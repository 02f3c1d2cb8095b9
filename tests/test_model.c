/* test_model.c: config.json: what each family means, both spellings of the rotary settings and the defaults, where each tensor lies, and
 * that what cannot be calibrated is refused by one line that names the file and the key. */
#include "compare.h"
#include "model.h"

static const char PATH[] = "folder/config.json";

/* A whole config.json in one piece: what every family needs, then `more`, which begins with a comma when it is not empty. */
static const char *config(const char *family, const char *more) {
  static char text[2000];
  snprintf(text, sizeof text,
           "{\"model_type\": \"%s\", \"num_hidden_layers\": 3, \"hidden_size\": 48, \"intermediate_size\": 80, "
           "\"num_attention_heads\": 6, \"vocab_size\": 100%s}",
           family, more);
  return text;
}

static struct model parsed(const char *text) {
  struct model model;
  struct error error = {0};
  memset(&model, 0xa5, sizeof model);
  if (model_parse(&model, text, PATH, &error)) fail_msg("%s\n%s", error.message, text);
  return model;
}

/* ---- what is read ---- */

static void sizes_and_defaults(void **context) {
  (void)context;
  struct model m = parsed(config("llama", ""));
  assert_string_equal(m.model_type, "llama");
  assert_int_equal(m.blocks, 3);
  assert_int_equal(m.hidden, 48);
  assert_int_equal(m.ffn, 80);
  assert_int_equal(m.heads, 6);
  assert_int_equal(m.kv_heads, 6);
  assert_int_equal(m.head_size, 8);
  assert_int_equal(m.vocabulary, 100);
  assert_int_equal(m.window, 0);
  assert_true(m.norm_eps == 1e-6f);
  assert_false(m.tied_embeddings);
  assert_int_equal(m.rope.scaling, ROPE_PLAIN);
  assert_true(m.rope.theta == 10000);
  m = parsed(config("llama", ", \"num_key_value_heads\": 2, \"head_dim\": 16, \"rms_norm_eps\": 1e-5, \"tie_word_embeddings\": true, "
                             "\"hidden_act\": \"silu\", \"partial_rotary_factor\": 1.0, \"rope_scaling\": null, \"sliding_window\": 4"));
  assert_int_equal(m.kv_heads, 2);
  assert_int_equal(m.head_size, 16);
  assert_true(m.norm_eps == 1e-5f);
  assert_true(m.tied_embeddings);
  assert_int_equal(m.window, 0); /* not a thing of this family */
  m = parsed(
      config("llama", ", \"num_key_value_heads\": null, \"head_dim\": null, \"quantization_config\": null, \"attention_bias\": null"));
  assert_int_equal(m.kv_heads, 6);
  assert_int_equal(m.head_size, 8);
}

/* Which linear layers have a bias, as a string of letters in the order q k v o gate up down. */
static const char *biases(const struct model *model) {
  static char letters[LINEARS + 1];
  int count = 0;
  for (int i = 0; i < LINEARS; i++)
    if (model->linear[i].bias != ABSENT) letters[count++] = "qkvogud"[i];
  letters[count] = 0;
  return letters;
}

static void families(void **context) {
  (void)context;
  static const struct {
    const char *family, *more, *biases;
    bool qk_norm;
    int window;
  } cases[] = {
      {"llama", "", "", false, 0},
      {"llama", ", \"attention_bias\": true", "qkvo", false, 0},
      {"llama", ", \"mlp_bias\": true, \"attention_bias\": false", "gud", false, 0},
      {"mistral", ", \"sliding_window\": 4096", "", false, 4096},
      {"mistral", ", \"sliding_window\": null, \"attention_bias\": true", "", false, 0},
      {"qwen2", ", \"sliding_window\": 8, \"use_sliding_window\": false, \"attention_bias\": false", "qkv", false, 0},
      {"qwen3", "", "", true, 0},
      {"qwen3", ", \"attention_bias\": true, \"mlp_bias\": true, \"sliding_window\": 8", "qkvo", true, 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct model m = parsed(config(cases[i].family, cases[i].more));
    assert_string_equal(m.model_type, cases[i].family);
    assert_string_equal(biases(&m), cases[i].biases);
    assert_int_equal(m.window, cases[i].window);
    assert_int_equal(m.norm[NORM_Q] != ABSENT, cases[i].qk_norm);
    assert_int_equal(m.norm[NORM_K] != ABSENT, cases[i].qk_norm);
    assert_string_equal(model_names(&m)->embedding, "model.embed_tokens.weight");
    assert_string_equal(model_names(&m)->block_prefix, "model.layers.%d.");
  }
}

static void rotary_settings(void **context) {
  (void)context;
  static const struct {
    const char *more;
    struct rope_settings rope;
  } cases[] = {
      {", \"rope_theta\": 500000.0", {ROPE_PLAIN, 500000, 0, 0, 0, 0}},
      {", \"rope_theta\": 500000, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.5}", {ROPE_LINEAR, 500000, 2.5, 0, 0, 0}},
      {", \"rope_scaling\": {\"rope_type\": \"default\"}", {ROPE_PLAIN, 10000, 0, 0, 0, 0}},
      {", \"rope_theta\": 2e4, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": "
       "4.0, "
       "\"original_max_position_embeddings\": 8192}",
       {ROPE_LLAMA3, 20000, 8, 1, 4, 8192}},
      /* transformers 5 */
      {", \"rope_parameters\": {\"rope_theta\": 1e6, \"rope_type\": \"default\"}", {ROPE_PLAIN, 1e6, 0, 0, 0, 0}},
      {", \"rope_parameters\": {\"rope_theta\": 1e6}", {ROPE_PLAIN, 1e6, 0, 0, 0, 0}},
      {", \"rope_theta\": 7000, \"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 4}", {ROPE_LINEAR, 7000, 4, 0, 0, 0}},
      {", \"rope_theta\": 7000, \"rope_scaling\": null, \"rope_parameters\": {\"rope_theta\": 2e3, \"rope_type\": \"linear\", \"factor\": "
       "4}",
       {ROPE_LINEAR, 2000, 4, 0, 0, 0}},
      {", \"rope_parameters\": {\"rope_type\": \"llama3\", \"rope_theta\": 3e5, \"factor\": 32.0, \"low_freq_factor\": 1.0, "
       "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 8192}",
       {ROPE_LLAMA3, 300000, 32, 1, 4, 8192}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct rope_settings got = parsed(config("llama", cases[i].more)).rope, want = cases[i].rope;
    assert_int_equal(got.scaling, want.scaling);
    assert_true(got.theta == want.theta && got.factor == want.factor && got.original_positions == want.original_positions);
    assert_true(got.low_frequency_factor == want.low_frequency_factor && got.high_frequency_factor == want.high_frequency_factor);
  }
}

/* ---- where tensors lie ---- */

static const struct block_tensor *tensor_named(const struct model *model, const char *name) {
  for (int i = 0; i < model->tensors; i++)
    if (strcmp(model->tensor[i].name, name) == 0) return &model->tensor[i];
  fail_msg("no tensor %s", name);
  return NULL;
}

static void check_tensor(const struct model *model, const char *name, int dimensions, int64_t rows, int64_t columns) {
  const struct block_tensor *tensor = tensor_named(model, name);
  assert_int_equal(tensor->dimensions, dimensions);
  assert_int_equal(tensor->rows, rows);
  assert_int_equal(tensor->columns, columns);
}

static void tensors_of_a_block(void **context) {
  (void)context;
  struct model m = parsed(config("qwen3", ", \"num_key_value_heads\": 2, \"head_dim\": 16, \"attention_bias\": true"));
  assert_int_equal(m.tensors, 7 + 4 + 4);
  check_tensor(&m, "input_layernorm.weight", 1, 1, 48);
  check_tensor(&m, "post_attention_layernorm.weight", 1, 1, 48);
  check_tensor(&m, "self_attn.q_proj.weight", 2, 96, 48);
  check_tensor(&m, "self_attn.q_proj.bias", 1, 1, 96);
  check_tensor(&m, "self_attn.k_proj.weight", 2, 32, 48);
  check_tensor(&m, "self_attn.v_proj.bias", 1, 1, 32);
  check_tensor(&m, "self_attn.q_norm.weight", 1, 1, 16);
  check_tensor(&m, "self_attn.k_norm.weight", 1, 1, 16);
  check_tensor(&m, "self_attn.o_proj.weight", 2, 48, 96);
  check_tensor(&m, "self_attn.o_proj.bias", 1, 1, 48);
  check_tensor(&m, "mlp.gate_proj.weight", 2, 80, 48);
  check_tensor(&m, "mlp.up_proj.weight", 2, 80, 48);
  check_tensor(&m, "mlp.down_proj.weight", 2, 48, 80);
  assert_string_equal(m.linear[LINEAR_DOWN].name, "mlp.down_proj");
  assert_string_equal(m.tensor[m.linear[LINEAR_K].weight].name, "self_attn.k_proj.weight");
  assert_string_equal(m.tensor[m.norm[NORM_MLP]].name, "post_attention_layernorm.weight");
}

/* No two tensors overlap and each lies at its alignment, also when types differ. */
static void layout_holds_every_tensor(void **context) {
  (void)context;
  struct model m = parsed(config("qwen2", ", \"num_key_value_heads\": 1"));
  for (int i = 0; i < m.tensors; i++) m.tensor[i].dtype = i % 3 ? DTYPE_BF16 : DTYPE_F32;
  model_layout(&m);
  size_t bytes = 0;
  int64_t elements = 0;
  for (int i = 0; i < m.tensors; i++) {
    const struct block_tensor *tensor = &m.tensor[i];
    assert_true(tensor->image_offset >= bytes && tensor->image_offset % 64 == 0);
    assert_true(tensor->element_offset >= elements && tensor->element_offset % 16 == 0);
    bytes = tensor->image_offset + (size_t)(tensor->rows * tensor->columns) * dtype_size(tensor->dtype);
    elements = tensor->element_offset + tensor->rows * tensor->columns;
  }
  assert_true(m.image_bytes >= bytes && m.elements >= elements);
  elements = 0;
  for (int i = 0; i < LINEARS; i++) {
    assert_true(m.linear[i].element_offset >= elements && m.linear[i].element_offset % 16 == 0);
    elements = m.linear[i].element_offset + m.linear[i].rows * m.linear[i].columns;
  }
  assert_true(m.linear_elements >= elements);
}

/* The largest sizes that are taken at all: nothing overflows (the sanitizers' build watches). */
static void largest_sizes(void **context) {
  (void)context;
  struct model m = parsed("{\"model_type\": \"llama\", \"num_hidden_layers\": 16777216, \"hidden_size\": 16777216, "
                          "\"intermediate_size\": 16777216, \"num_attention_heads\": 8388608, \"vocab_size\": 16777216}");
  assert_int_equal(m.head_size, 2);
  assert_true(m.linear_elements == 7 * ((int64_t)1 << 48));
  assert_true(m.image_bytes == (size_t)4 * (size_t)m.elements && m.elements == m.linear_elements + 2 * ((int64_t)1 << 24));
}

/* ---- refusals ---- */

static void refuse(const char *text, const char *expected) {
  struct model model;
  struct error error = {0};
  if (model_parse(&model, text, PATH, &error) != ERROR_INPUT || error.code != ERROR_INPUT)
    fail_msg("not refused, for '%s': %s", expected, text);
  if (strncmp(error.message, PATH, sizeof PATH - 1) != 0) fail_msg("'%s' does not begin with the file", error.message);
  if (!strstr(error.message, expected)) fail_msg("'%s' does not say '%s'", error.message, expected);
  for (const char *c = error.message; *c; c++)
    if ((unsigned char)*c < 0x20) fail_msg("more than one plain line: '%s'", error.message);
}

static void texts_that_are_no_config(void **context) {
  (void)context;
  refuse("", ":1: not a JSON object");
  refuse("[]", ":1: not a JSON object; it has to be the model's config.json");
  refuse("3", "not a JSON object");
  refuse("{\"a\": \"b\nc\"}", "not a JSON object");
  refuse("{\"model_type\": \"llama\",\n\"hidden_size\": 48", ":2: not a JSON object");
  refuse("{\"model_type\": \"llama\", \"model_type\": \"llama\"}", "duplicate");
  refuse("{\"model_type\": \"llama\", \"rms_norm_eps\": NaN}", "not a JSON object");
  refuse("{\"rms_norm_eps\": 1e999}", "not a JSON object");
  refuse("{}", "model_type: a missing one is not supported; llama, mistral, qwen2 and qwen3 are");
  refuse("{\"model_type\": 5}", "model_type");
  refuse("{\"model_type\": \"gpt2\"}", "model_type: \"gpt2\" is not supported; llama, mistral, qwen2 and qwen3 are");
  refuse("{\"model_type\": \"Llama\"}", "\"Llama\" is not supported");
  refuse("{\"model_type\": \"two\\nlines\\u0001\"}", "is not supported");
}

static void sizes_that_are_none(void **context) {
  (void)context;
  static const char *const keys[] = {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"};
  static const char *const values[] = {"0", "-1", "16777217", "9223372036854775807", "48.0", "\"48\"", "[48]", "true", "null"};
  static const char *const optional[] = {"num_key_value_heads", "head_dim"};
  char text[600], expected[120];
  for (int missing = 0; missing < 5; missing++)
    for (int value = -1; value < 9; value++) {
      size_t length = (size_t)snprintf(text, sizeof text, "{\"model_type\": \"llama\"");
      for (int i = 0; i < 5; i++)
        if (i != missing || value >= 0)
          length += (size_t)snprintf(text + length, sizeof text - length, ", \"%s\": %s", keys[i], i == missing ? values[value] : "48");
      snprintf(text + length, sizeof text - length, "}");
      snprintf(expected, sizeof expected, ": %s: %s; it has to be a whole number from 1 to 16777216", keys[missing],
               value < 0 || value == 8 ? "missing" : "not a size");
      refuse(text, expected);
    }
  for (int i = 0; i < 2; i++)
    for (int value = 0; value < 8; value++) {
      snprintf(text, sizeof text, ", \"%s\": %s", optional[i], values[value]);
      snprintf(expected, sizeof expected, ": %s: not a size; it has to be", optional[i]);
      refuse(config("llama", text), expected);
    }
  refuse(config("mistral", ", \"sliding_window\": 0"), ": sliding_window: not a size; it has to be");
  refuse(config("mistral", ", \"sliding_window\": 1e3"), ": sliding_window: not a size; it has to be");
}

static void sizes_that_do_not_fit(void **context) {
  (void)context;
  refuse(config("llama", ", \"num_key_value_heads\": 4"), ": num_key_value_heads: 4 does not divide num_attention_heads 6");
  refuse(config("llama", ", \"num_key_value_heads\": 12"), ": num_key_value_heads: 12 does not divide num_attention_heads 6");
  refuse(config("llama", ", \"head_dim\": 7"), ": head_dim: 7 is odd, rotary embedding needs pairs");
  refuse(config("llama", ", \"head_dim\": 16777216"), ": head_dim: 6 heads of 16777216 are more than 16777216 columns");
  refuse("{\"model_type\": \"llama\", \"num_hidden_layers\": 1, \"hidden_size\": 48, \"intermediate_size\": 1, \"num_attention_heads\": 5, "
         "\"vocab_size\": 1}",
         ": num_attention_heads: 5 does not divide hidden_size 48, and there is no head_dim");
  refuse(
      "{\"model_type\": \"llama\", \"num_hidden_layers\": 1, \"hidden_size\": 48, \"intermediate_size\": 1, \"num_attention_heads\": 96, "
      "\"vocab_size\": 1}",
      ": num_attention_heads: 96 does not divide hidden_size 48, and there is no head_dim");
  refuse(
      "{\"model_type\": \"llama\", \"num_hidden_layers\": 1, \"hidden_size\": 48, \"intermediate_size\": 1, \"num_attention_heads\": 16, "
      "\"vocab_size\": 1}",
      ": head_dim: 3 is odd");
}

static void numbers_that_are_none(void **context) {
  (void)context;
  static const char *const values[] = {"0", "-1e-5", "\"1e-5\"", "[]", "false", "1e-300"};
  char text[200];
  for (int i = 0; i < 6; i++) {
    snprintf(text, sizeof text, ", \"rms_norm_eps\": %s", values[i]);
    refuse(config("llama", text), ": rms_norm_eps: not positive; it has to be a positive number");
    snprintf(text, sizeof text, ", \"rope_theta\": %s", values[i]);
    refuse(config("llama", text), ": rope_theta: not positive; it has to be a positive number");
    snprintf(text, sizeof text, ", \"rope_parameters\": {\"rope_theta\": %s}", values[i]);
    refuse(config("llama", text), ": rope_theta: not positive; it has to be a positive number");
  }
  refuse(config("llama", ", \"rms_norm_eps\": 1e300"), ": rms_norm_eps: too large; it has to be a positive number");
  refuse(config("llama", ", \"rope_theta\": 1e39"), ": rope_theta: too large; it has to be a positive number");
  refuse(config("llama", ", \"tie_word_embeddings\": 1"), ": tie_word_embeddings: not true or false");
  refuse(config("llama", ", \"attention_bias\": \"yes\""), ": attention_bias: not true or false");
  refuse(config("llama", ", \"mlp_bias\": 0"), ": mlp_bias: not true or false");
}

static void rotary_settings_that_are_not_known(void **context) {
  (void)context;
  static const char *const llama3[] = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"};
  static const char *const places[] = {"rope_scaling", "rope_parameters"};
  char text[400], expected[100];
  for (int place = 0; place < 2; place++) {
    snprintf(text, sizeof text, ", \"%s\": {\"rope_type\": \"yarn\", \"factor\": 4}", places[place]);
    refuse(config("llama", text), ": rope_type: \"yarn\" is not supported; default, linear and llama3 are");
    snprintf(text, sizeof text, ", \"%s\": {\"rope_type\": \"a\\nb\"}", places[place]);
    refuse(config("llama", text), "is not supported; default, linear and llama3 are");
    snprintf(text, sizeof text, ", \"%s\": {\"rope_type\": \"linear\"}", places[place]);
    refuse(config("llama", text), ": factor: missing; it has to be a positive number");
    snprintf(text, sizeof text, ", \"%s\": {\"rope_type\": \"linear\", \"factor\": -2}", places[place]);
    refuse(config("llama", text), ": factor: not positive; it has to be a positive number");
    snprintf(text, sizeof text, ", \"%s\": {\"rope_type\": 3, \"factor\": 2}", places[place]);
    refuse(config("llama", text), "rope_type");
    snprintf(text, sizeof text, ", \"%s\": [1, 2]", places[place]);
    refuse(config("llama", text), "rope_type");
    snprintf(text, sizeof text, ", \"%s\": \"linear\"", places[place]);
    refuse(config("llama", text), "rope_type");
    for (int missing = 0; missing < 4; missing++) {
      size_t length = (size_t)snprintf(text, sizeof text, ", \"%s\": {\"rope_type\": \"llama3\"", places[place]);
      for (int i = 0; i < 4; i++)
        if (i != missing) length += (size_t)snprintf(text + length, sizeof text - length, ", \"%s\": %d", llama3[i], 2 + i);
      snprintf(text + length, sizeof text - length, "}");
      snprintf(expected, sizeof expected, ": %s: missing; it has to be a positive number", llama3[missing]);
      refuse(config("llama", text), expected);
    }
  }
  refuse(config("llama", ", \"rope_scaling\": {\"factor\": 2}"),
         ": rope_scaling: no rope_type in it; it has to be default, linear or llama3");
  /* one set for each kind of layer, as transformers 5 writes models that mix kinds */
  refuse(config("qwen3", ", \"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\", \"rope_theta\": 1e6}}"),
         "rope_parameters");
}

static void models_that_would_silently_be_others(void **context) {
  (void)context;
  refuse(config("llama", ", \"hidden_act\": \"gelu\""), ": hidden_act: only \"silu\" is supported");
  refuse(config("llama", ", \"hidden_act\": 1"), ": hidden_act: only \"silu\" is supported");
  refuse(config("qwen2", ", \"use_sliding_window\": true, \"sliding_window\": 8"), ": use_sliding_window: a window in some blocks only");
  refuse(config("qwen2", ", \"use_sliding_window\": 1"), ": use_sliding_window: not true or false");
  refuse(config("llama", ", \"partial_rotary_factor\": 0.5"), ": partial_rotary_factor: only 1 is supported");
  refuse(config("llama", ", \"partial_rotary_factor\": \"1\""), ": partial_rotary_factor: only 1 is supported");
  refuse(config("llama", ", \"quantization_config\": {\"bits\": 4}"),
         ": quantization_config: this checkpoint is quantized already; give the");
}

/* An error that was there before is kept: the first is the cause. */
static void the_first_error_is_kept(void **context) {
  (void)context;
  struct model model;
  struct error error = {0};
  refuse(config("llama", ", \"hidden_act\": \"gelu\", \"head_dim\": 7"), "hidden_act");
  error_set(&error, ERROR_WORK, "before");
  model_parse(&model, "[]", PATH, &error);
  assert_string_equal(error.message, "before");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(sizes_and_defaults),
      cmocka_unit_test(families),
      cmocka_unit_test(rotary_settings),
      cmocka_unit_test(tensors_of_a_block),
      cmocka_unit_test(layout_holds_every_tensor),
      cmocka_unit_test(largest_sizes),
      cmocka_unit_test(texts_that_are_no_config),
      cmocka_unit_test(sizes_that_are_none),
      cmocka_unit_test(sizes_that_do_not_fit),
      cmocka_unit_test(numbers_that_are_none),
      cmocka_unit_test(rotary_settings_that_are_not_known),
      cmocka_unit_test(models_that_would_silently_be_others),
      cmocka_unit_test(the_first_error_is_kept),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
