/* lwc.c: clipping factors of a block. */
#include "lwc.h"

static const float START_GAMMA = 4.0f;
static const float LARGEST_SEARCHED = 0.982f; /* sigmoid(4): a start that leaves gamma a gradient */

int lwc_init(struct lwc *lwc, const struct model *model, struct kernels *k, const struct recipe *recipe, struct error *error) {
  *lwc = (struct lwc){.k = k, .sigmoid = recipe->optimizer == OPTIMIZER_ADAMW, .stored_scale = recipe->stored_scale};
  for (int i = 0; i < LINEARS; i++) {
    const struct linear *linear = &model->linear[i];
    int64_t group = recipe->group_size && recipe->group_size < linear->columns ? recipe->group_size : linear->columns;
    lwc->shape[i] = (struct weight_shape){linear->rows, linear->columns, {recipe->wbits, recipe->symmetric, group}};
    lwc->first[i] = lwc->groups;
    lwc->groups += weight_groups(&lwc->shape[i]);
  }
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

void lwc_search(struct lwc *lwc, const struct block *block, const float *const importance[LINEARS], struct world *world) {
  struct kernels *k = lwc->k;
  size_t count = 2 * (size_t)lwc->groups, bytes = count * sizeof(float);
  k->clear(k, lwc->parameter, bytes);
  for (int i = 0; i < LINEARS; i++) {
    int64_t groups = weight_groups(&lwc->shape[i]);
    float *hi = lwc->parameter + lwc->first[i], *lo = hi + lwc->groups;
    k->clip_search(k, hi, lo, block_weight(block, (enum linear_role)i, BLOCK_FULL), importance[i], &lwc->shape[i],
                   groups * world->rank / world->size, groups * (world->rank + 1) / world->size);
  }
  world_allreduce(world, lwc->parameter, count, lwc->factor); /* every group was searched by one rank: the sum gathers them */
  if (lwc->sigmoid) k->sigmoid_inverse(k, lwc->parameter, LARGEST_SEARCHED, 2 * lwc->groups);
  lwc_update_factors(lwc);
}

void lwc_quantize(const struct lwc *lwc, struct block *block, const float *factor, bool at_rest) {
  for (int i = 0; i < LINEARS; i++) {
    enum linear_role role = (enum linear_role)i;
    const float *hi = factor ? factor + lwc->first[i] : NULL, *lo = factor ? hi + lwc->groups : NULL;
    lwc->k->quantize_forward(lwc->k, block_effective(block, role), block_weight(block, role, BLOCK_FULL), hi, lo, &lwc->shape[i], at_rest);
  }
}

void lwc_backward(const struct lwc *lwc, const struct block *block, enum linear_role role, const data *dw, float *gradient) {
  int64_t first = lwc->first[role];
  lwc->k->quantize_backward(lwc->k, gradient + first, gradient + lwc->groups + first, dw, block_weight(block, role, BLOCK_FULL),
                            lwc->factor + first, lwc->factor + lwc->groups + first, &lwc->shape[role], lwc->stored_scale);
}
