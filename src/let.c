/* let.c: where a model's places are, the start of their scales and shifts, folding, and the gradients back through it. */
#include "let.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const float LEAST_SCALE = 1e-2f, LARGEST_SCALE = 1e4f;
static const float LEAST_ABSMAX = 1e-5f; /* of activations and weights: a channel that is zero has no outliers to move */

const char *let_place_name(enum let_place place) {
  static const char *const names[LET_PLACES] = {"attention_norm", "mlp_norm", "value", "query_key", "up"};
  return names[place];
}

/* ---- the places of a model ---- */

static struct channel_map identity(int64_t channels) {
  return (struct channel_map){(int)channels, 1, (int)channels};
}

static void add_place(struct let *let, enum let_place place, int64_t channels) {
  let->channels[place] = channels;
  let->s[place] = let->scales;
  let->scales += channels;
}

static void add_norm(struct let *let, enum let_place place, enum norm_role norm) {
  add_place(let, place, let->model->hidden);
  let->norm[norm] = (struct let_side){place, 0, identity(let->model->hidden), true};
}

static void add_reader(struct let *let, enum let_place place, int linear) {
  if (let->model->linear[linear].weight != ABSENT) let->column[linear] = (struct let_side){place, 0, identity(let->model->hidden), false};
}

static void add_mlp_readers(struct let *let, enum let_place place) {
  add_reader(let, place, LINEAR_ROUTER);
  for (int e = 0; e < model_mlps(let->model); e++) {
    add_reader(let, place, linear_of_expert(LINEAR_GATE, e));
    add_reader(let, place, linear_of_expert(LINEAR_UP, e));
  }
}

static void add_value(struct let *let) {
  const struct model *model = let->model;
  int D = model->head_size, share = model->heads / model->kv_heads;
  add_place(let, LET_VALUE, (int64_t)model->kv_heads * D);
  let->row[LINEAR_V] = (struct let_side){LET_VALUE, 0, identity((int64_t)model->kv_heads * D), true};
  let->column[LINEAR_O] = (struct let_side){LET_VALUE, 0, {D, share, D}, false};
}

/* A head norm is the same for all heads, so that there s is too. */
static void add_query_key(struct let *let) {
  const struct model *model = let->model;
  int D = model->head_size, share = model->heads / model->kv_heads, period = model->rope.theta > 0 ? D / 2 : D;
  struct channel_map one = {D, 1, period}, query = {D, share, period};
  if (model->norm[NORM_Q] != ABSENT) {
    add_place(let, LET_QUERY_KEY, period);
    let->norm[NORM_Q] = (struct let_side){LET_QUERY_KEY, 0, one, true};
    let->norm[NORM_K] = (struct let_side){LET_QUERY_KEY, 0, one, false};
  } else {
    add_place(let, LET_QUERY_KEY, (int64_t)model->kv_heads * period);
    let->row[LINEAR_Q] = (struct let_side){LET_QUERY_KEY, 0, query, true};
    let->row[LINEAR_K] = (struct let_side){LET_QUERY_KEY, 0, one, false};
  }
}

static void add_up(struct let *let) {
  int64_t F = let->model->ffn;
  add_place(let, LET_UP, model_mlps(let->model) * F);
  for (int e = 0; e < model_mlps(let->model); e++) {
    let->row[linear_of_expert(LINEAR_UP, e)] = (struct let_side){LET_UP, e * F, identity(F), true};
    let->column[linear_of_expert(LINEAR_DOWN, e)] = (struct let_side){LET_UP, e * F, identity(F), false};
  }
}

/* A shift needs a bias on both of its sides, so that no family gains one. */
static void add_deltas(struct let *let) {
  const struct model *model = let->model;
  let->count = let->scales;
  for (int place = LET_ATTENTION_NORM; place <= LET_VALUE; place++) {
    int norm = place == LET_ATTENTION_NORM ? NORM_ATTENTION : NORM_MLP;
    bool biases = place == LET_VALUE ? model->linear[LINEAR_V].bias != ABSENT : model->norm_bias[norm] != ABSENT;
    for (int i = 0; i < model->linears; i++)
      if (let->column[i].place == place) biases = biases && model->linear[i].bias != ABSENT;
    if (!let->channels[place] || !biases) continue;
    let->delta[place] = let->count;
    let->count += let->channels[place];
  }
}

static void find_places(struct let *let, const struct recipe *recipe) {
  const struct model *model = let->model;
  if (!model->post_norm) { /* else the residual reads the norm's output too */
    add_norm(let, LET_ATTENTION_NORM, NORM_ATTENTION);
    for (int i = LINEAR_Q; i <= LINEAR_V; i++) add_reader(let, LET_ATTENTION_NORM, i);
    if (model->norm[NORM_MLP] != ABSENT) add_norm(let, LET_MLP_NORM, NORM_MLP);
    add_mlp_readers(let, model->norm[NORM_MLP] != ABSENT ? LET_MLP_NORM : LET_ATTENTION_NORM);
  }
  add_value(let);
  if (recipe_kv_bits(&recipe->activations) < 16) add_query_key(let); /* its gradient comes from quantized queries and keys alone */
  if (recipe->let_up) add_up(let);
  if (recipe->activations.abits < 16)
    add_deltas(let);
  else
    let->count = let->scales;
}

/* ---- memory ---- */

static void *device_memory(struct kernels *k, int64_t count, struct error *error) {
  void *memory = error->code ? NULL : k->allocate(k, (size_t)(count ? count : 1) * sizeof(float));
  if (!memory) error_set(error, ERROR_WORK, "out of memory on %s for equivalent transformations", k->name);
  return memory;
}

static int64_t longest_vector(const struct model *model) {
  int64_t longest = model->hidden;
  for (int i = 0; i < model->linears; i++) {
    if (model->linear[i].rows > longest) longest = model->linear[i].rows;
    if (model->linear[i].columns > longest) longest = model->linear[i].columns;
  }
  return longest;
}

/* Where each place's statistics are. */
static void place_statistics(struct let_statistics *statistics, const struct model *model) {
  int64_t *columns = statistics->columns;
  columns[LET_ATTENTION_NORM] = model->post_norm ? 0 : model->hidden;
  columns[LET_MLP_NORM] = model->post_norm || model->norm[NORM_MLP] == ABSENT ? 0 : model->hidden;
  columns[LET_VALUE] = (int64_t)model->heads * model->head_size;
  columns[LET_UP] = (int64_t)model_mlps(model) * model->ffn;
  for (int place = 0; place < LET_PLACES; place++) {
    statistics->at[place] = statistics->count;
    statistics->count += columns[place];
  }
}

int let_init(struct let *let, const struct model *model, struct kernels *k, const struct recipe *recipe, struct error *error) {
  *let = (struct let){.k = k, .model = model, .alpha = recipe->alpha};
  for (int i = 0; i < LET_PLACES; i++) let->delta[i] = ABSENT;
  for (int i = 0; i < NORMS; i++) let->norm[i].place = ABSENT;
  for (int i = 0; i < model->linears; i++) let->row[i].place = let->column[i].place = let->row_at[i] = let->column_at[i] = ABSENT;
  if (!recipe->let) return 0;
  if (recipe->let_up && model->activation == ACTIVATION_GELU)
    return error_set(error, ERROR_INPUT, "let_up: %s has GELU between up and down, through which no scale passes; set it to false",
                     model->model_type);
  find_places(let, recipe);
  int64_t expanded = 0, longest = longest_vector(model);
  for (int i = 0; i < model->linears; i++) {
    if (let->row[i].place != ABSENT) let->row_at[i] = expanded, expanded += model->linear[i].rows;
    if (let->column[i].place != ABSENT) let->column_at[i] = expanded, expanded += model->linear[i].columns;
  }
  struct let_statistics statistics = {0};
  place_statistics(&statistics, model);
  let->start = calloc((size_t)(4 * statistics.count + let->count), sizeof *let->start);
  if (!let->start) return error_set(error, ERROR_WORK, "out of memory for equivalent transformations");
  let->parameter = device_memory(k, let->count, error);
  let->expanded = device_memory(k, expanded, error);
  float **const scratch[] = {&let->drow, &let->dcolumn, &let->shift, &let->plus, &let->inner, &let->dinner};
  for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++) *scratch[i] = device_memory(k, longest, error);
  return error->code;
}

void let_free(struct let *let) {
  void *const device[] = {let->parameter, let->expanded, let->drow, let->dcolumn, let->shift, let->plus, let->inner, let->dinner};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    if (device[i]) let->k->release(let->k, device[i]);
  free(let->start);
  memset(let, 0, sizeof *let);
}

/* ---- statistics ---- */

int let_statistics_init(struct let_statistics *statistics, const struct model *model, struct kernels *k, struct error *error) {
  *statistics = (struct let_statistics){.k = k};
  place_statistics(statistics, model);
  statistics->absmax = device_memory(k, statistics->count, error);
  statistics->middle = device_memory(k, statistics->count, error);
  return error->code;
}

void let_statistics_free(struct let_statistics *statistics) {
  if (statistics->absmax) statistics->k->release(statistics->k, statistics->absmax);
  if (statistics->middle) statistics->k->release(statistics->k, statistics->middle);
  *statistics = (struct let_statistics){0};
}

static void observe_input(const struct let_statistics *statistics, const struct block *block, int linear, int64_t at, int64_t columns,
                          float *middle, float weight) {
  int64_t rows;
  const data *x = block_input(block, linear, &rows);
  statistics->k->column_range(statistics->k, statistics->absmax + at, middle + at, weight, x, rows, columns);
}

void let_observe(struct let_statistics *statistics, const struct block *block, float *middle, float weight) {
  static const int reader[LET_PLACES] = {[LET_ATTENTION_NORM] = LINEAR_Q, [LET_MLP_NORM] = LINEAR_UP, [LET_VALUE] = LINEAR_O};
  const struct model *model = block->model;
  for (int place = LET_ATTENTION_NORM; place <= LET_VALUE; place++) {
    int linear = place == LET_MLP_NORM && model->experts ? LINEAR_ROUTER : reader[place];
    if (statistics->columns[place])
      observe_input(statistics, block, linear, statistics->at[place], statistics->columns[place], middle, weight);
  }
  for (int e = 0; e < model_mlps(model); e++)
    observe_input(statistics, block, linear_of_expert(LINEAR_DOWN, e), statistics->at[LET_UP] + e * (int64_t)model->ffn, model->ffn, middle,
                  weight);
}

/* ---- start ---- */

/* Host copies of what a place starts from: of the activations' and the first reader's columns, [columns] each. */
struct start {
  const float *absmax, *middle;
  float *weight;
  float *of_entry; /* the same by entry of the place's vectors */
};

/* absmax of the columns of the weights that read at a place; where all share s, of the first (up, of each expert). */
static void weight_absmax(struct let *let, const struct block *block, enum let_place place, float *host) {
  static const int first_reader[LET_PLACES] = {LINEAR_Q, LINEAR_UP, LINEAR_O, 0, LINEAR_DOWN};
  struct kernels *k = let->k;
  for (int e = 0; e < model_mlps(let->model); e++) {
    int i = linear_of_expert((enum linear_role)first_reader[place], e);
    bool of_expert = place == LET_MLP_NORM || place == LET_UP;
    if (e > 0 && !of_expert) break;
    const struct linear *linear = &let->model->linear[i];
    if (e == 0 || place == LET_UP) k->clear(k, let->dcolumn, (size_t)linear->columns * sizeof(float));
    k->column_range(k, let->dcolumn, NULL, 1, block_tensor(block, BLOCK_FULL, linear->weight), linear->rows, linear->columns);
    k->download(k, host + (place == LET_UP ? e * linear->columns : 0), let->dcolumn, (size_t)linear->columns * sizeof(float));
  }
}

/* Which entry of the place's vectors a column of the statistics belongs to. */
static int64_t entry_of(const struct let *let, enum let_place place, int64_t column) {
  if (place != LET_VALUE) return column;
  const struct channel_map *map = &let->column[LINEAR_O].map;
  return column / map->head_size / map->share * map->period + column % map->head_size % map->period;
}

/* s and delta of one place from the columns' statistics: of several query heads that share an entry the largest, and the mean. */
static void start_place(const struct let *let, enum let_place place, int64_t columns, const struct start *from, float *parameter) {
  int64_t channels = let->channels[place];
  float *s = parameter + let->s[place], *delta = let->delta[place] == ABSENT ? NULL : parameter + let->delta[place];
  float share = (float)channels / (float)columns;
  for (int64_t i = 0; i < channels; i++) s[i] = 0;
  for (int64_t c = 0; c < columns; c++) { /* s holds the largest activation first, then its quotient */
    int64_t i = entry_of(let, place, c);
    s[i] = fmaxf(s[i], from->absmax[c]);
    from->of_entry[i] = fmaxf(from->of_entry[i], from->weight[c]);
    if (delta) delta[i] += from->middle[c] * share;
  }
  for (int64_t i = 0; i < channels; i++) {
    double activation = fmaxf(s[i], LEAST_ABSMAX), reader = fmaxf(from->of_entry[i], LEAST_ABSMAX);
    s[i] = (float)fmax(pow(activation, let->alpha) / pow(reader, 1 - let->alpha), LEAST_ABSMAX);
  }
}

void let_start(struct let *let, const struct block *block, const struct let_statistics *statistics) {
  struct kernels *k = let->k;
  int64_t count = statistics->count;
  float *host = let->start, *parameter = host + 4 * count;
  memset(host, 0, (size_t)(4 * count + let->count) * sizeof *host);
  k->download(k, host, statistics->absmax, (size_t)count * sizeof(float));
  k->download(k, host + count, statistics->middle, (size_t)count * sizeof(float));
  for (int64_t i = 0; i < let->scales; i++) parameter[i] = 1;
  for (int place = 0; place < LET_PLACES; place++) {
    float *of_place = host + statistics->at[place];
    struct start from = {of_place, of_place + count, of_place + 2 * count, of_place + 3 * count};
    if (!let->channels[place] || place == LET_QUERY_KEY) continue;
    weight_absmax(let, block, (enum let_place)place, from.weight);
    start_place(let, (enum let_place)place, statistics->columns[place], &from, parameter);
  }
  k->upload(k, let->parameter, parameter, (size_t)let->count * sizeof(float));
  let_limit(let);
}

void let_limit(struct let *let) {
  let->k->clamp(let->k, let->parameter, LEAST_SCALE, LARGEST_SCALE, let->scales);
}

/* ---- folding ---- */

static const float *s_of(const struct let *let, const struct let_side *side, const float *parameter) {
  return parameter + let->s[side->place] + side->first;
}

/* A side's shift in `to`, or NULL. */
static const float *expand_delta(const struct let *let, const struct let_side *side, const float *parameter, float *to, int64_t count) {
  if (side->place == ABSENT || let->delta[side->place] == ABSENT) return NULL;
  let->k->expand(let->k, to, parameter + let->delta[side->place], &side->map, count, false);
  return to;
}

static void expand_side(const struct let *let, const struct let_side *side, const float *parameter, int64_t at, int64_t count) {
  if (side->place != ABSENT) let->k->expand(let->k, let->expanded + at, s_of(let, side, parameter), &side->map, count, side->divide);
}

struct weight_scales let_scales(const struct let *let, int linear) {
  struct weight_scales scales = {NULL, NULL};
  if (let->folded && let->row_at[linear] != ABSENT) scales.row = let->expanded + let->row_at[linear];
  if (let->folded && let->column_at[linear] != ABSENT) scales.column = let->expanded + let->column_at[linear];
  return scales;
}

/* What a linear layer's bias becomes: (b + W delta_in - delta_out) * row. */
struct bias_fold {
  const float *plus, *shift, *scale;
};

static struct bias_fold bias_fold(struct let *let, const struct block *block, int linear, const float *parameter) {
  const struct linear *layer = &let->model->linear[linear];
  struct bias_fold fold = {NULL, NULL, let_scales(let, linear).row};
  const float *in = expand_delta(let, &let->column[linear], parameter, let->inner, layer->columns);
  if (in) {
    let->k->matrix_vector(let->k, let->plus, block_tensor(block, BLOCK_FULL, layer->weight), in, layer->rows, layer->columns);
    fold.plus = let->plus;
  }
  fold.shift = expand_delta(let, &let->row[linear], parameter, let->shift, layer->rows);
  return fold;
}

static void fold_linear(struct let *let, struct block *block, int linear, const float *parameter) {
  struct kernels *k = let->k;
  const struct linear *layer = &let->model->linear[linear];
  if (layer->weight == ABSENT) return;
  expand_side(let, &let->row[linear], parameter, let->row_at[linear], layer->rows);
  expand_side(let, &let->column[linear], parameter, let->column_at[linear], layer->columns);
  struct weight_scales scales = let_scales(let, linear);
  if (!layer->quantized)
    k->scale_weight(k, block_tensor(block, BLOCK_QUANTIZED, layer->weight), block_tensor(block, BLOCK_FULL, layer->weight), &scales,
                    layer->rows, layer->columns);
  if (layer->bias == ABSENT) return;
  struct bias_fold fold = bias_fold(let, block, linear, parameter);
  k->fold_vector(k, block_tensor(block, BLOCK_QUANTIZED, layer->bias), block_tensor(block, BLOCK_FULL, layer->bias), fold.plus, fold.shift,
                 fold.scale, layer->rows);
}

static int64_t norm_channels(const struct let *let, int norm) {
  return let->model->tensor[let->model->norm[norm]].columns;
}

static void fold_norm(struct let *let, struct block *block, int norm, const float *parameter) {
  struct kernels *k = let->k;
  const struct let_side *side = &let->norm[norm];
  int weight = let->model->norm[norm], bias = let->model->norm_bias[norm];
  if (side->place == ABSENT) return;
  int64_t count = norm_channels(let, norm);
  k->expand(k, let->inner, s_of(let, side, parameter), &side->map, count, side->divide);
  k->fold_vector(k, block_tensor(block, BLOCK_QUANTIZED, weight), block_tensor(block, BLOCK_FULL, weight), NULL, NULL, let->inner, count);
  if (bias == ABSENT) return;
  const float *shift = expand_delta(let, side, parameter, let->shift, count);
  k->fold_vector(k, block_tensor(block, BLOCK_QUANTIZED, bias), block_tensor(block, BLOCK_FULL, bias), NULL, shift, let->inner, count);
}

void let_expect(struct let *let, const float *parameter) {
  let->folded = parameter && let->count;
}

void let_fold(struct let *let, struct block *block, const float *parameter) {
  block_restore(block);
  let_expect(let, parameter);
  if (!let->folded) return;
  for (int i = 0; i < let->model->linears; i++) fold_linear(let, block, i, parameter);
  for (int i = 0; i < NORMS; i++) fold_norm(let, block, i, parameter);
}

/* ---- gradients ---- */

/* Adds what a side's expanded s received to the gradient. */
static void side_backward(struct let *let, const struct let_side *side, const float *d, int64_t count, const float *parameter,
                          float *gradient) {
  let->k->expand_backward(let->k, gradient + let->s[side->place] + side->first, d, s_of(let, side, parameter), &side->map, count,
                          side->divide, 1);
}

static void delta_backward(struct let *let, const struct let_side *side, const float *d, int64_t count, float *gradient, float sign) {
  let->k->expand_backward(let->k, gradient + let->delta[side->place], d, NULL, &side->map, count, false, sign);
}

void let_backward_weight(const struct let *let, const struct block *block, int linear, struct row_range rows, const data *dw, float *drow,
                         float *dcolumn) {
  const struct linear *layer = &let->model->linear[linear];
  struct weight_scales scales = let_scales(let, linear);
  const data *w = data_at(let->k, block_tensor(block, BLOCK_FULL, layer->weight), rows.first * layer->columns);
  if (scales.row) scales.row += rows.first;
  let->k->scale_weight_backward(let->k, scales.row ? drow + rows.first : NULL, scales.column ? dcolumn : NULL, dw, w, &scales, rows.count,
                                layer->columns);
}

void let_backward_scales(struct let *let, int linear, struct row_range rows, const float *drow, const float *dcolumn,
                         const float *parameter, float *gradient) {
  const struct linear *layer = &let->model->linear[linear];
  bool last = rows.first + rows.count == layer->rows;
  if (last && let->row_at[linear] != ABSENT) side_backward(let, &let->row[linear], drow, layer->rows, parameter, gradient);
  if (let->column_at[linear] != ABSENT) side_backward(let, &let->column[linear], dcolumn, layer->columns, parameter, gradient);
}

static void bias_backward(struct let *let, const struct block *block, int linear, const float *d, const float *parameter, float *gradient) {
  struct kernels *k = let->k;
  const struct linear *layer = &let->model->linear[linear];
  const struct let_side *row = &let->row[linear], *column = &let->column[linear];
  struct bias_fold fold = bias_fold(let, block, linear, parameter);
  k->clear(k, let->drow, (size_t)layer->rows * sizeof(float));
  k->fold_vector_backward(k, let->dinner, fold.scale ? let->drow : NULL, d, block_tensor(block, BLOCK_FULL, layer->bias), fold.plus,
                          fold.shift, fold.scale, layer->rows);
  if (fold.scale) side_backward(let, row, let->drow, layer->rows, parameter, gradient);
  if (fold.shift) delta_backward(let, row, let->dinner, layer->rows, gradient, -1);
  if (!fold.plus) return;
  k->clear(k, let->dcolumn, (size_t)layer->columns * sizeof(float));
  k->vector_matrix(k, let->dcolumn, let->dinner, block_tensor(block, BLOCK_FULL, layer->weight), layer->rows, layer->columns);
  delta_backward(let, column, let->dcolumn, layer->columns, gradient, 1);
}

static void norm_backward(struct let *let, const struct block *block, int norm, bool bias, const float *d, const float *parameter,
                          float *gradient) {
  struct kernels *k = let->k;
  const struct let_side *side = &let->norm[norm];
  if (side->place == ABSENT) return;
  int64_t count = norm_channels(let, norm);
  int tensor = bias ? let->model->norm_bias[norm] : let->model->norm[norm];
  k->expand(k, let->inner, s_of(let, side, parameter), &side->map, count, side->divide);
  const float *shift = bias ? expand_delta(let, side, parameter, let->shift, count) : NULL;
  k->clear(k, let->drow, (size_t)count * sizeof(float));
  k->fold_vector_backward(k, let->dinner, let->drow, d, block_tensor(block, BLOCK_FULL, tensor), NULL, shift, let->inner, count);
  side_backward(let, side, let->drow, count, parameter, gradient);
  if (shift) delta_backward(let, side, let->dinner, count, gradient, -1);
}

void let_backward_vector(struct let *let, const struct block *block, int tensor, const float *d, const float *parameter, float *gradient) {
  const struct model *model = let->model;
  for (int i = 0; i < NORMS; i++)
    if (model->norm[i] == tensor || model->norm_bias[i] == tensor)
      norm_backward(let, block, i, model->norm_bias[i] == tensor, d, parameter, gradient);
  for (int i = 0; i < model->linears; i++)
    if (model->linear[i].bias == tensor) bias_backward(let, block, i, d, parameter, gradient);
}
