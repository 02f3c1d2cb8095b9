/* same_store.h: comparing what two calibrations have stored. */
#ifndef OMNIQUANT_SAME_STORE_H
#define OMNIQUANT_SAME_STORE_H

#include <stdio.h>
#include <string.h>

#include "store.h"

static inline bool same_linear(const struct quantized_linear *a, const struct quantized_linear *b, const char **what) {
  *what = "shapes or settings";
  if (strcmp(a->name, b->name) != 0 || a->out_features != b->out_features || a->in_features != b->in_features || a->bits != b->bits ||
      a->group_size != b->group_size || a->symmetric != b->symmetric)
    return false;
  size_t groups = (size_t)(a->out_features * ((a->in_features + a->group_size - 1) / a->group_size));
  *what = "codes";
  if (memcmp(a->codes, b->codes, (size_t)(a->out_features * packed_row_bytes(a->in_features, a->bits))) != 0) return false;
  *what = "scale";
  if (memcmp(a->scale, b->scale, groups * sizeof *a->scale) != 0) return false;
  *what = "zero_point";
  return memcmp(a->zero_point, b->zero_point, groups) == 0;
}

static inline bool same_array(const struct named_array *a, const struct named_array *b) {
  size_t count = (size_t)(a->shape[0] * (a->dimensions == 2 ? a->shape[1] : 1));
  return strcmp(a->name, b->name) == 0 && a->dimensions == b->dimensions && a->shape[0] == b->shape[0] &&
         (a->dimensions == 1 || a->shape[1] == b->shape[1]) && memcmp(a->values, b->values, count * sizeof *a->values) == 0;
}

static inline bool same_arrays(const struct named_array *a, int a_count, const struct named_array *b, int b_count, int block,
                               const char *where) {
  if (a_count != b_count) {
    printf("block %d: %d and %d arrays %s\n", block, a_count, b_count, where);
    return false;
  }
  for (int i = 0; i < a_count; i++)
    if (!same_array(&a[i], &b[i])) {
      printf("block %d: array %s %s differs\n", block, a[i].name, where);
      return false;
    }
  return true;
}

static inline bool same_record(const struct block_record *a, const struct block_record *b) {
  const char *what;
  if (a->linears != b->linears || strcmp(a->kept, b->kept) != 0) {
    printf("block %d: %d linears, kept '%s', and %d, kept '%s'\n", a->index, a->linears, a->kept, b->linears, b->kept);
    return false;
  }
  for (int i = 0; i < a->linears; i++)
    if (!same_linear(&a->linear[i], &b->linear[i], &what)) {
      printf("block %d: %s: %s differ\n", a->index, a->linear[i].name, what);
      return false;
    }
  return same_arrays(a->folded, a->folded_arrays, b->folded, b->folded_arrays, a->index, "in the block") &&
         same_arrays(a->calibration, a->calibration_arrays, b->calibration, b->calibration_arrays, a->index, "of the calibration");
}

static inline bool same_block(struct store *a, struct store *b, int index, struct error *error) {
  struct block_record left = {0}, right = {0};
  bool same = store_has_block(a, index) == store_has_block(b, index);
  if (!same) printf("block %d is in only one of the stores\n", index);
  if (same && store_has_block(a, index))
    same = !store_read_block(a, index, &left, error) && !store_read_block(b, index, &right, error) && same_record(&left, &right);
  block_record_free(&left);
  block_record_free(&right);
  return same;
}

/* Whether both hold the same blocks, bit for bit, but for times; prints the first difference. */
static inline bool same_store(const char *a_folder, const char *b_folder) {
  struct error error = {0};
  struct store *a = NULL, *b = NULL;
  bool same = !store_open(a_folder, &a, &error) && !store_open(b_folder, &b, &error);
  if (same && store_info(a)->blocks != store_info(b)->blocks) {
    printf("the models have %d and %d blocks\n", store_info(a)->blocks, store_info(b)->blocks);
    same = false;
  }
  int stored = 0;
  for (int i = 0; same && i < store_info(a)->blocks; i++) {
    same = same_block(a, b, i, &error);
    stored += store_has_block(a, i);
  }
  if (same && stored == 0) {
    printf("neither store holds a block\n");
    same = false;
  }
  store_close(a, &error);
  store_close(b, &error);
  if (error.code) printf("%s\n", error.message);
  return same;
}

#endif
