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

/* What a family assumes where config.json does not say. */
static void defaults_of_families(void **context) {
  (void)context;
  struct model m = parsed(config("opt", ", \"ffn_dim\": 80"));
  assert_true(m.tied_embeddings && m.final_norm && m.layer_norm && !m.post_norm && !m.parallel);
  assert_int_equal(m.positions, 2048);
  assert_int_equal(m.embedding, 48);
  assert_int_equal(m.activation, ACTIVATION_RELU);
  assert_true(m.norm_eps == 1e-5f && m.rope.theta == 0);
  m = parsed(config("falcon", ""));
  assert_true(m.tied_embeddings && m.final_norm && m.layer_norm && m.parallel && !m.post_norm);
  assert_int_equal(m.ffn, 4 * 48); /* intermediate_size is not a key of this family */
  assert_int_equal(m.kv_heads, 1);
  assert_int_equal(m.positions, 0);
  assert_int_equal(m.activation, ACTIVATION_GELU);
  assert_true(m.norm_eps == 1e-5f && m.rope.theta == 10000);
  m = parsed(config("mixtral", ""));
  assert_true(!m.tied_embeddings && m.final_norm && !m.layer_norm && !m.parallel && !m.post_norm);
  assert_int_equal(m.experts, 8);
  assert_int_equal(m.experts_per_token, 2);
  assert_int_equal(m.window, 0);
  assert_int_equal(m.activation, ACTIVATION_SILU_GATED);
  assert_true(m.norm_eps == 1e-5f && m.rope.theta == 1e6);
  m = parsed(config("llama", ""));
  assert_int_equal(m.experts, 0);
  assert_int_equal(m.experts_per_token, 1);
  assert_int_equal(m.embedding, 48);
}

/* What config.json says instead. */
static void settings_of_families(void **context) {
  (void)context;
  struct model m = parsed(config("opt", ", \"ffn_dim\": 96, \"do_layer_norm_before\": false, \"word_embed_proj_dim\": 32, "
                                        "\"max_position_embeddings\": 64, \"activation_function\": \"relu\", \"enable_bias\": true"));
  assert_int_equal(m.ffn, 96);
  assert_true(m.post_norm && !m.final_norm);
  assert_int_equal(m.embedding, 32);
  assert_int_equal(m.positions, 64);
  m = parsed(config("opt", ", \"ffn_dim\": 96, \"_remove_final_layer_norm\": true, \"activation_function\": \"gelu\", "
                           "\"tie_word_embeddings\": false"));
  assert_true(!m.post_norm && !m.final_norm && !m.tied_embeddings);
  assert_int_equal(m.activation, ACTIVATION_GELU);
  m = parsed(config("falcon", ", \"ffn_hidden_size\": 80, \"layer_norm_epsilon\": 1e-6, \"rope_theta\": 5e5, \"activation\": \"relu\", "
                              "\"alibi\": false, \"bias\": false, \"tie_word_embeddings\": false, \"num_kv_heads\": 6"));
  assert_int_equal(m.ffn, 80);
  assert_int_equal(m.kv_heads, 1); /* num_kv_heads is that of the new architecture */
  assert_true(m.norm_eps == 1e-6f && m.rope.theta == 5e5 && !m.tied_embeddings);
  assert_int_equal(m.activation, ACTIVATION_RELU);
  m = parsed(config("mixtral", ", \"num_local_experts\": 4, \"num_experts_per_tok\": 1, \"sliding_window\": 4096, \"head_dim\": null, "
                               "\"num_key_value_heads\": 2, \"rope_theta\": 10000.0"));
  assert_int_equal(m.experts, 4);
  assert_int_equal(m.experts_per_token, 1);
  assert_int_equal(m.window, 4096);
  assert_int_equal(m.kv_heads, 2);
  assert_true(m.rope.theta == 10000);
}

/* Which linear layers have a bias, as a string of letters in the order q k v o router gate up down. */
static const char *biases(const struct model *model) {
  static char letters[ROLES + 1];
  int count = 0;
  for (int i = 0; i < ROLES; i++)
    if (model->linear[i].bias != ABSENT) letters[count++] = "qkvorgud"[i];
  letters[count] = 0;
  return letters;
}

/* Which norms there are, likewise: a m q k, and in capitals those with a bias. */
static const char *norms(const struct model *model) {
  static char letters[NORMS + 1];
  int count = 0;
  for (int i = 0; i < NORMS; i++)
    if (model->norm[i] != ABSENT) letters[count++] = (model->norm_bias[i] != ABSENT ? "AMQK" : "amqk")[i];
  letters[count] = 0;
  return letters;
}

static void families(void **context) {
  (void)context;
  static const struct {
    const char *family, *more, *biases, *norms;
    int window;
  } cases[] = {
      {"llama", "", "", "am", 0},
      {"llama", ", \"attention_bias\": true", "qkvo", "am", 0},
      {"llama", ", \"mlp_bias\": true, \"attention_bias\": false", "gud", "am", 0},
      {"mistral", ", \"sliding_window\": 4096", "", "am", 4096},
      {"mistral", ", \"sliding_window\": null, \"attention_bias\": true", "", "am", 0},
      {"qwen2", ", \"sliding_window\": 8, \"use_sliding_window\": false, \"attention_bias\": false", "qkv", "am", 0},
      {"qwen3", "", "", "amqk", 0},
      {"qwen3", ", \"attention_bias\": true, \"mlp_bias\": true, \"sliding_window\": 8", "qkvo", "amqk", 0},
      {"opt", ", \"ffn_dim\": 80", "qkvoud", "AM", 0},
      {"opt", ", \"ffn_dim\": 80, \"do_layer_norm_before\": false", "qkvoud", "AM", 0},
      {"falcon", "", "", "A", 0},
      {"falcon", ", \"parallel_attn\": false", "", "AM", 0},
      {"falcon", ", \"new_decoder_architecture\": true", "", "AM", 0},
      {"falcon", ", \"new_decoder_architecture\": true, \"num_ln_in_parallel_attn\": null", "", "AM", 0},
      {"falcon", ", \"new_decoder_architecture\": true, \"num_ln_in_parallel_attn\": 1", "", "A", 0},
      {"mixtral", ", \"attention_bias\": true, \"mlp_bias\": true, \"sliding_window\": 16", "", "am", 16},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct model m = parsed(config(cases[i].family, cases[i].more));
    assert_string_equal(m.model_type, cases[i].family);
    assert_string_equal(biases(&m), cases[i].biases);
    assert_string_equal(norms(&m), cases[i].norms);
    assert_int_equal(m.window, cases[i].window);
  }
}

static void names_outside_the_blocks(void **context) {
  (void)context;
  static const char *const like_llama[] = {"llama", "mistral", "qwen2", "qwen3", "mixtral"};
  for (int i = 0; i < 5; i++) {
    struct model m = parsed(config(like_llama[i], ""));
    assert_string_equal(model_names(&m)->embedding, "model.embed_tokens.weight");
    assert_string_equal(model_names(&m)->block_prefix, "model.layers.%d.");
    assert_string_equal(model_names(&m)->final_norm, "model.norm.weight");
    assert_null(model_names(&m)->final_norm_bias);
    assert_null(model_names(&m)->positions);
  }
  struct model m = parsed(config("opt", ", \"ffn_dim\": 80"));
  assert_string_equal(model_names(&m)->block_prefix, "model.decoder.layers.%d.");
  assert_string_equal(model_names(&m)->embedding, "model.decoder.embed_tokens.weight");
  assert_string_equal(model_names(&m)->positions, "model.decoder.embed_positions.weight");
  assert_string_equal(model_names(&m)->project_in, "model.decoder.project_in.weight");
  assert_string_equal(model_names(&m)->project_out, "model.decoder.project_out.weight");
  assert_string_equal(model_names(&m)->final_norm_bias, "model.decoder.final_layer_norm.bias");
  m = parsed(config("falcon", ""));
  assert_string_equal(model_names(&m)->block_prefix, "transformer.h.%d.");
  assert_string_equal(model_names(&m)->embedding, "transformer.word_embeddings.weight");
  assert_string_equal(model_names(&m)->final_norm, "transformer.ln_f.weight");
  assert_string_equal(model_names(&m)->final_norm_bias, "transformer.ln_f.bias");
  assert_string_equal(model_names(&m)->head, "lm_head.weight");
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

static void tensors_of_an_opt_block(void **context) {
  (void)context;
  struct model m = parsed(config("opt", ", \"ffn_dim\": 80, \"word_embed_proj_dim\": 32"));
  assert_int_equal(m.tensors, 2 * 6 + 2 * 2);
  check_tensor(&m, "self_attn_layer_norm.bias", 1, 1, 48);
  check_tensor(&m, "final_layer_norm.weight", 1, 1, 48);
  check_tensor(&m, "self_attn.out_proj.weight", 2, 48, 48);
  check_tensor(&m, "self_attn.k_proj.bias", 1, 1, 48);
  check_tensor(&m, "fc1.weight", 2, 80, 48);
  check_tensor(&m, "fc1.bias", 1, 1, 80);
  check_tensor(&m, "fc2.weight", 2, 48, 80);
  check_tensor(&m, "fc2.bias", 1, 1, 48);
  assert_int_equal(m.linear[LINEAR_GATE].weight, ABSENT);
  assert_int_equal(m.linear[LINEAR_ROUTER].weight, ABSENT);
  assert_false(m.linear[LINEAR_GATE].quantized || m.linear[LINEAR_ROUTER].quantized);
  assert_true(m.linear[LINEAR_UP].quantized && m.linear[LINEAR_Q].quantized);
  assert_string_equal(m.linear[LINEAR_UP].name, "fc1");
}

/* Each row of the checkpoint's fused tensor belongs to one row of q, k or v; `head` says of each of its heads to which: 'q', 'k' or 'v',
 * those of a kind in their order. */
static void check_fused(const struct model *m, const char *heads) {
  static const char kinds[] = "qkv";
  int64_t D = m->head_size, next[3] = {0}, total = (int64_t)strlen(heads) * D;
  for (int i = LINEAR_Q; i <= LINEAR_V; i++) {
    const struct block_tensor *tensor = &m->tensor[m->linear[i].weight];
    assert_string_equal(tensor->name, "self_attention.query_key_value.weight");
    assert_string_equal(m->linear[i].name, "self_attention.query_key_value");
    assert_int_equal(tensor->source.total, total);
    assert_int_equal(tensor->columns, m->hidden);
    assert_int_equal(tensor->rows % tensor->source.run, 0);
  }
  for (int64_t row = 0; row < total; row++) {
    int kind = (int)(strchr(kinds, heads[row / D]) - kinds);
    assert_int_equal(source_row(&m->tensor[m->linear[LINEAR_Q + kind].weight].source, next[kind]++), row);
  }
  for (int i = 0; i < 3; i++) assert_int_equal(next[i], m->tensor[m->linear[LINEAR_Q + i].weight].rows);
}

static void queries_keys_and_values_in_one_tensor(void **context) {
  (void)context;
  struct model m = parsed(config("falcon", ""));
  assert_int_equal(m.tensors, 6 + 2);
  check_tensor(&m, "input_layernorm.bias", 1, 1, 48);
  check_tensor(&m, "self_attention.dense.weight", 2, 48, 48);
  check_tensor(&m, "mlp.dense_h_to_4h.weight", 2, 192, 48);
  check_tensor(&m, "mlp.dense_4h_to_h.weight", 2, 48, 192);
  check_fused(&m, "qqqqqqkv"); /* 7B: multi-query */
  m = parsed(config("falcon", ", \"new_decoder_architecture\": true, \"num_kv_heads\": 2"));
  assert_int_equal(m.kv_heads, 2);
  check_tensor(&m, "ln_attn.weight", 1, 1, 48);
  check_tensor(&m, "ln_mlp.bias", 1, 1, 48);
  check_fused(&m, "qqqkvqqqkv"); /* 40B: a kv head with its queries */
  m = parsed(config("falcon", ", \"new_decoder_architecture\": true"));
  check_fused(&m, "qkvqkvqkvqkvqkvqkv");
  m = parsed(config("falcon", ", \"multi_query\": false, \"parallel_attn\": false"));
  assert_int_equal(m.kv_heads, 6);
  check_tensor(&m, "post_attention_layernorm.weight", 1, 1, 48);
  check_fused(&m, "qkvqkvqkvqkvqkvqkv");
}

/* Tensors that are whole in the checkpoint are one run. */
static void whole_tensors(void **context) {
  (void)context;
  struct model m = parsed(config("qwen2", ", \"num_key_value_heads\": 2"));
  for (int i = 0; i < m.tensors; i++) {
    const struct block_tensor *tensor = &m.tensor[i];
    int64_t entries = tensor->dimensions == 2 ? tensor->rows : tensor->columns;
    assert_int_equal(tensor->source.total, entries);
    assert_int_equal(tensor->source.run, entries);
    for (int64_t row = 0; row < entries; row++) assert_int_equal(source_row(&tensor->source, row), row);
  }
}

static void experts_of_a_block(void **context) {
  (void)context;
  char name[64];
  struct model m = parsed(config("mixtral", ", \"num_local_experts\": 64, \"num_key_value_heads\": 2"));
  assert_int_equal(m.linears, 4 + 1 + 3 * 64);
  assert_int_equal(m.linears, MODEL_MAX_LINEARS);
  assert_int_equal(m.tensors, 2 + 4 + 1 + 3 * 64);
  assert_true(m.tensors <= MODEL_MAX_TENSORS);
  check_tensor(&m, "block_sparse_moe.gate.weight", 2, 64, 48);
  assert_false(m.linear[LINEAR_ROUTER].quantized);
  assert_string_equal(m.linear[LINEAR_ROUTER].name, "block_sparse_moe.gate");
  for (int e = 0; e < 64; e++)
    for (int i = 0; i < 3; i++) {
      const struct linear *linear = &m.linear[linear_of_expert((enum linear_role)(LINEAR_GATE + i), e)];
      snprintf(name, sizeof name, "block_sparse_moe.experts.%d.%s", e, (const char *[]){"w1", "w3", "w2"}[i]);
      assert_string_equal(linear->name, name);
      assert_true(linear->quantized && linear->bias == ABSENT);
      assert_int_equal(linear->rows, i == 2 ? 48 : 80);
      assert_int_equal(linear->columns, i == 2 ? 80 : 48);
      snprintf(name, sizeof name, "%s.weight", linear->name);
      assert_string_equal(m.tensor[linear->weight].name, name);
    }
}

/* No two tensors overlap and each lies at its alignment, also when types differ. */
static void layout_holds_every_tensor(void **context) {
  (void)context;
  static const char *const cases[][2] = {{"qwen2", ", \"num_key_value_heads\": 1"},
                                         {"opt", ", \"ffn_dim\": 20"},
                                         {"falcon", ", \"new_decoder_architecture\": true, \"num_kv_heads\": 3"},
                                         {"mixtral", ", \"num_local_experts\": 3"}};
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    struct model m = parsed(config(cases[k][0], cases[k][1]));
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
  }
}

/* The largest sizes that are taken at all: nothing overflows (the sanitizers' build watches). */
static void largest_sizes(void **context) {
  (void)context;
  struct model m = parsed("{\"model_type\": \"llama\", \"num_hidden_layers\": 16777216, \"hidden_size\": 16777216, "
                          "\"intermediate_size\": 16777216, \"num_attention_heads\": 8388608, \"vocab_size\": 16777216}");
  assert_int_equal(m.head_size, 2);
  assert_true(m.elements == 7 * ((int64_t)1 << 48) + 2 * ((int64_t)1 << 24) && m.image_bytes == (size_t)4 * (size_t)m.elements);
  m = parsed("{\"model_type\": \"mixtral\", \"num_hidden_layers\": 16777216, \"hidden_size\": 16777216, \"num_local_experts\": 64, "
             "\"intermediate_size\": 16777216, \"num_attention_heads\": 8388608, \"vocab_size\": 16777216}");
  assert_true(m.elements == (4 + 3 * 64) * ((int64_t)1 << 48) + (64 + 2) * ((int64_t)1 << 24));
  m = parsed("{\"model_type\": \"falcon\", \"num_hidden_layers\": 16777216, \"hidden_size\": 16777216, \"multi_query\": false, "
             "\"num_attention_heads\": 8388608, \"vocab_size\": 16777216}");
  assert_int_equal(m.tensor[m.linear[LINEAR_V].weight].source.total, 3 << 24);
  assert_int_equal(m.ffn, 4 << 24);
}

static void positions_that_are_learned(void **context) {
  (void)context;
  struct error error = {0};
  struct model m = parsed(config("opt", ", \"ffn_dim\": 80, \"max_position_embeddings\": 64"));
  assert_int_equal(model_check_seqlen(&m, 64, "folder", &error), 0);
  assert_int_equal(model_check_seqlen(&m, 65, "folder", &error), ERROR_INPUT);
  assert_string_equal(error.message, "folder: max_position_embeddings: the model has learned 64 positions, seqlen is 65; lower --seqlen");
  error.code = 0;
  m = parsed(config("llama", ", \"max_position_embeddings\": 64"));
  assert_int_equal(model_check_seqlen(&m, 65, "folder", &error), 0);
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
  refuse("{}", "model_type: a missing one is not supported; llama, mistral, qwen2, qwen3, opt, falcon and mixtral are");
  refuse("{\"model_type\": 5}", "model_type");
  refuse("{\"model_type\": \"gpt2\"}", "model_type: \"gpt2\" is not supported; llama, mistral, qwen2, qwen3, opt, falcon and mixtral are");
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

static void families_that_are_not_quite_known(void **context) {
  (void)context;
  static const struct {
    const char *family, *more, *expected;
  } cases[] = {
      {"opt", "", ": ffn_dim: missing; it has to be"},
      {"opt", "\"enable_bias\": false", ": enable_bias: an OPT without biases is not supported"},
      {"opt", "\"layer_norm_elementwise_affine\": false", ": layer_norm_elementwise_affine: norms without weights are not supported"},
      {"opt", "\"activation_function\": \"gelu_new\"", ": activation_function: only \"relu\" and \"gelu\" are supported"},
      {"opt", "\"activation_function\": 3", ": activation_function: only \"relu\" and \"gelu\" are supported"},
      {"opt", "\"do_layer_norm_before\": 1", ": do_layer_norm_before: not true or false"},
      {"opt", "\"max_position_embeddings\": 0", ": max_position_embeddings: not a size"},
      {"opt", "\"word_embed_proj_dim\": -1", ": word_embed_proj_dim: not a size"},
      {"falcon", "\"alibi\": true", ": alibi: only rotary positions are supported"},
      {"falcon", "\"bias\": true", ": bias: a Falcon whose linear layers have biases is not supported"},
      {"falcon", "\"activation\": \"silu\"", ": activation: only \"relu\" and \"gelu\" are supported"},
      {"falcon", "\"new_decoder_architecture\": true, \"num_kv_heads\": 4", ": num_kv_heads: 4 does not divide num_attention_heads 6"},
      {"falcon", "\"new_decoder_architecture\": true, \"num_kv_heads\": 0", ": num_kv_heads: not a size"},
      {"falcon", "\"new_decoder_architecture\": true, \"num_ln_in_parallel_attn\": 3", ": num_ln_in_parallel_attn: 3 is not 1 or 2"},
      {"falcon", "\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}", ": rope_type: \"dynamic\" is not supported"},
      {"mixtral", "\"num_local_experts\": 65", ": num_local_experts: 65 are more than the 64 that are supported"},
      {"mixtral", "\"num_local_experts\": 0", ": num_local_experts: not a size"},
      {"mixtral", "\"num_experts_per_tok\": 9", ": num_experts_per_tok: 9, but there are 8 experts"},
      {"mixtral", "\"hidden_act\": \"gelu\"", ": hidden_act: only \"silu\" is supported"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const char *more = cases[i].more, *comma = *more ? ", " : "";
    bool opt = strcmp(cases[i].family, "opt") == 0 && *more;
    char text[300];
    snprintf(text, sizeof text, "%s%s%s", opt ? ", \"ffn_dim\": 80" : "", comma, more);
    refuse(config(cases[i].family, text), cases[i].expected);
  }
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
      cmocka_unit_test(defaults_of_families),
      cmocka_unit_test(settings_of_families),
      cmocka_unit_test(families),
      cmocka_unit_test(names_outside_the_blocks),
      cmocka_unit_test(rotary_settings),
      cmocka_unit_test(tensors_of_a_block),
      cmocka_unit_test(tensors_of_an_opt_block),
      cmocka_unit_test(queries_keys_and_values_in_one_tensor),
      cmocka_unit_test(whole_tensors),
      cmocka_unit_test(experts_of_a_block),
      cmocka_unit_test(layout_holds_every_tensor),
      cmocka_unit_test(largest_sizes),
      cmocka_unit_test(positions_that_are_learned),
      cmocka_unit_test(texts_that_are_no_config),
      cmocka_unit_test(sizes_that_are_none),
      cmocka_unit_test(sizes_that_do_not_fit),
      cmocka_unit_test(numbers_that_are_none),
      cmocka_unit_test(rotary_settings_that_are_not_known),
      cmocka_unit_test(models_that_would_silently_be_others),
      cmocka_unit_test(families_that_are_not_quite_known),
      cmocka_unit_test(the_first_error_is_kept),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
