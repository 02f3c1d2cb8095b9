/* lwc.c: clipping factors of a block. */
#include "lwc.h"

static const float START_GAMMA = 4.0f;
static const float LARGEST_SEARCHED = 0.982f; /* sigmoid(4): a start that leaves gamma a gradient */

struct quantized_shape lwc_shape(const struct linear *linear, const struct recipe *recipe) {
  int64_t row = linear->columns > 0 ? linear->columns : 1; /* a layer that the family has not */
  int64_t group = recipe->group_size && recipe->group_size < row ? recipe->group_size : row;
  return (struct quantized_shape){linear->quantized ? linear->rows : 0, linear->columns, {recipe->wbits, recipe->symmetric, group}};
}

static void place_factors(struct lwc *lwc, const struct model *model, const struct recipe *recipe, bool mlp) {
  for (int i = 0; i < model->linears; i++) {
    if ((role_of_linear(i) >= LINEAR_GATE) != mlp) continue;
    lwc->shape[i] = lwc_shape(&model->linear[i], recipe);
    lwc->first[i] = 2 * lwc->groups;
    lwc->groups += groups_of(&lwc->shape[i]);
  }
}

int lwc_init(struct lwc *lwc, const struct model *model, struct kernels *k, const struct recipe *recipe, struct error *error) {
  *lwc = (struct lwc){.k = k, .sigmoid = recipe->optimizer == OPTIMIZER_ADAMW, .stored_scale = recipe->stored_scale};
  place_factors(lwc, model, recipe, true);
  lwc->early = 2 * lwc->groups;
  place_factors(lwc, model, recipe, false);
  size_t bytes = 2 * (size_t)lwc->groups * sizeof(float);
  lwc->parameter = k->allocate(k, bytes);
  lwc->factor = k->allocate(k, bytes);
  if (!lwc->parameter || !lwc->factor)
    return error_set(error, ERROR_WORK, "out of memory on %s for clipping factors (%zu bytes)", k->name, bytes);
  return 0;
}

void lwc_free(struct lwc *lwc) {
  if (lwc->parameter) lwc->k->release(lwc->k, lwc->parameter);
  if (lwc->factor) lwc->k->release(lwc->k, lwc->factor);
  *lwc = (struct lwc){0};
}

void lwc_start(struct lwc *lwc) {
  lwc->k->fill(lwc->k, lwc->parameter, lwc->sigmoid ? START_GAMMA : 1.0f, 2 * lwc->groups);
  lwc_update_factors(lwc);
}

void lwc_update_factors(struct lwc *lwc) {
  if (lwc->sigmoid)
    lwc->k->sigmoid_forward(lwc->k, lwc->factor, lwc->parameter, 2 * lwc->groups);
  else
    lwc->k->copy(lwc->k, lwc->factor, lwc->parameter, 2 * (size_t)lwc->groups * sizeof(float));
}

/* The weight of a layer that is quantized; NULL for others. */
static const data *weight_of(const struct block *block, int linear) {
  const struct linear *layer = &block->model->linear[linear];
  return layer->quantized ? block_tensor(block, BLOCK_FULL, layer->weight) : NULL;
}

void lwc_search(struct lwc *lwc, const struct block *block, const struct let *let, const float *const importance[], struct world *world) {
  struct kernels *k = lwc->k;
  size_t count = 2 * (size_t)lwc->groups, bytes = count * sizeof(float);
  k->clear(k, lwc->parameter, bytes);
  for (int i = 0; i < block->model->linears; i++) {
    struct weight_scales scales = let_scales(let, i);
    int64_t groups = groups_of(&lwc->shape[i]);
    float *hi = lwc->parameter + lwc->first[i], *lo = hi + groups;
    if (weight_of(block, i))
      k->clip_search(k, hi, lo, weight_of(block, i), &scales, importance[i], &lwc->shape[i], groups * world->rank / world->size,
                     groups * (world->rank + 1) / world->size);
  }
  world_allreduce(world, lwc->parameter, count, lwc->factor); /* every group was searched by one rank: the sum gathers them */
  if (lwc->sigmoid) k->sigmoid_inverse(k, lwc->parameter, LARGEST_SEARCHED, 2 * lwc->groups);
  lwc_update_factors(lwc);
}

void lwc_round(const struct lwc *lwc, int linear, float *factor) {
  lwc->k->fill(lwc->k, factor + lwc->first[linear], 1, 2 * groups_of(&lwc->shape[linear]));
}

struct rows_of_weight lwc_rows(const struct lwc *lwc, const struct block *block, const struct let *let, int linear, struct row_range rows,
                               const float *factor) {
  struct rows_of_weight of = {.shape = lwc->shape[linear], .scales = let_scales(let, linear)};
  of.shape.rows = rows.count;
  of.w = data_at(block->k, weight_of(block, linear), rows.first * of.shape.columns);
  if (of.scales.row) of.scales.row += rows.first;
  of.hi_at = lwc->first[linear] + rows.first * groups_per_row(&of.shape);
  of.lo_at = of.hi_at + groups_of(&lwc->shape[linear]);
  if (factor) of.hi = factor + of.hi_at, of.lo = factor + of.lo_at;
  return of;
}

void lwc_quantize(const struct lwc *lwc, struct block *block, const struct let *let, const float *factor, bool at_rest) {
  shared_barrier(&block->of_effective);
  for (int i = 0; i < block->model->linears; i++) {
    const struct linear *layer = &block->model->linear[i];
    if (!layer->quantized) continue;
    int64_t first, end;
    shared_part(&block->of_effective, layer->rows, &first, &end);
    struct row_range rows = {first, end - first};
    struct rows_of_weight of = lwc_rows(lwc, block, let, i, rows, factor);
    data *w_hat = data_at(block->k, block_tensor(block, BLOCK_QUANTIZED, layer->weight), rows.first * layer->columns);
    lwc->k->quantize_forward(lwc->k, w_hat, of.w, &of.scales, of.hi, of.lo, &of.shape, at_rest);
  }
  shared_barrier(&block->of_effective);
}

void lwc_backward(const struct lwc *lwc, const struct block *block, const struct let *let, int linear, struct row_range rows,
                  const data *dw, const float *factor, float *gradient, float *drow, float *dcolumn) {
  struct rows_of_weight of = lwc_rows(lwc, block, let, linear, rows, factor);
  float *hi = gradient ? gradient + of.hi_at : NULL, *lo = gradient ? gradient + of.lo_at : NULL;
  lwc->k->quantize_backward(lwc->k, hi, lo, of.scales.row ? drow + rows.first : NULL, of.scales.column ? dcolumn : NULL, dw, of.w,
                            &of.scales, of.hi, of.lo, &of.shape, lwc->stored_scale);
}
