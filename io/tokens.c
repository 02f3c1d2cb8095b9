/* tokens.c: reading token ids out of an HDF5 file, in pieces, whatever integer type they are stored as. */
#include "tokens.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hdf5_util.h"
#include "sha256.h"

enum { PIECE = 1 << 16 }; /* ids read at once */

struct tokens {
  char *path;
  hid_t file, dataset;
  int64_t count;
};

/* A stranger's file may claim any number of tokens: *count must be backed by stored bytes. */
static int dataset_check(const struct hdf5_site *site, hid_t dataset, int64_t *count) {
  hsize_t length = 0;
  hid_t type = H5Dget_type(dataset), space = H5Dget_space(dataset);
  bool plain = type >= 0 && space >= 0 && H5Tget_class(type) == H5T_INTEGER && H5Tget_size(type) <= 8 &&
               H5Sget_simple_extent_type(space) == H5S_SIMPLE && H5Sget_simple_extent_ndims(space) == 1 &&
               H5Sget_simple_extent_dims(space, &length, NULL) == 1;
  size_t size = plain ? H5Tget_size(type) : 1;
  hdf5_close(space);
  hdf5_close(type);
  if (!plain) {
    return error_set(site->error, ERROR_INPUT, "%s: tokens: is not a one-dimensional integer dataset; make the file with tools/tokenize.py",
                     site->path);
  }
  if (length > INT64_MAX / 8 || length * size > H5Dget_storage_size(dataset)) {
    return error_set(site->error, ERROR_INPUT,
                     "%s: tokens: has %llu ids but too few bytes stored for them; the file is damaged, make it again", site->path,
                     (unsigned long long)length);
  }
  *count = (int64_t)length;
  return 0;
}

/* Adds the mend to what was wrong with a file of any kind. */
static int mend_add(struct error *error) {
  size_t length = strlen(error->message);
  if (error->code != ERROR_INPUT) return error->code;
  snprintf(error->message + length, sizeof error->message - length, "; make it anew with tools/tokenize.py");
  return error->code;
}

/* Opens `tokens`, which must be in this file and not a link out of it; negative with the error set. */
static hid_t dataset_open(const struct hdf5_site *site, hid_t file) {
  H5L_info_t info;
  hid_t dataset = -1;
  if (H5Lget_info(file, "tokens", &info, H5P_DEFAULT) >= 0 && info.type == H5L_TYPE_HARD) dataset = H5Dopen2(file, "tokens", H5P_DEFAULT);
  if (dataset < 0) {
    error_set(site->error, ERROR_INPUT, "%s: holds no dataset `tokens`; make the file with tools/tokenize.py", site->path);
  }
  return dataset;
}

int tokens_open(const char *path, struct tokens **tokens, struct error *error) {
  struct hdf5_site site = {path, error};
  int64_t bytes;
  struct tokens *opened = malloc(sizeof *opened);
  *tokens = NULL;
  if (!opened) return error_set(error, ERROR_WORK, "%s: out of memory", path);
  *opened = (struct tokens){.path = strdup(path), .file = -1, .dataset = -1};
  int failed = opened->path ? 0 : error_set(error, ERROR_WORK, "%s: out of memory", path);
  hdf5_enter();
  if (!failed) opened->file = hdf5_open(&site, &bytes);
  if (!failed && opened->file < 0) failed = mend_add(error);
  if (!failed) {
    opened->dataset = dataset_open(&site, opened->file);
    if (opened->dataset < 0) failed = error->code;
  }
  if (!failed) failed = dataset_check(&site, opened->dataset, &opened->count);
  hdf5_leave();
  if (failed) {
    tokens_close(opened);
    return failed;
  }
  *tokens = opened;
  return 0;
}

int64_t tokens_count(const struct tokens *tokens) {
  return tokens->count;
}

/* Reads ids [first, first + count), count <= PIECE, and checks 0 <= id < limit. */
static int piece_read(struct tokens *tokens, int64_t first, int64_t count, int64_t limit, int64_t *ids, struct error *error) {
  struct hdf5_site site = {tokens->path, error};
  hsize_t start = (hsize_t)first, length = (hsize_t)count;
  int failed = 0;
  hdf5_enter();
  hid_t memory = H5Screate_simple(1, &length, NULL), space = H5Dget_space(tokens->dataset);
  if (memory < 0 || space < 0 || H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &length, NULL) < 0 ||
      H5Dread(tokens->dataset, H5T_NATIVE_INT64, memory, space, H5P_DEFAULT, ids) < 0) {
    failed = hdf5_read_failed(&site, "tokens");
  }
  hdf5_close(space);
  hdf5_close(memory);
  hdf5_leave();
  for (int64_t i = 0; i < count && !failed; i++) {
    if (ids[i] >= 0 && ids[i] < limit) continue;
    failed = error_set(error, ERROR_INPUT,
                       "%s: tokens: the id at position %lld is %lld but must be in 0..%lld; tokenize with the tokenizer of this model",
                       tokens->path, (long long)(first + i), (long long)ids[i], (long long)(limit - 1));
  }
  return failed;
}

int tokens_read(struct tokens *tokens, int64_t first, int64_t count, int64_t vocabulary, int32_t *ids, struct error *error) {
  int64_t limit = vocabulary <= INT32_MAX ? vocabulary : INT32_MAX;
  int failed = 0;
  if (first < 0 || count < 0 || first > tokens->count || count > tokens->count - first) {
    return error_set(error, ERROR_INPUT,
                     "%s: %lld tokens from position %lld on are asked for but the file holds %lld; take fewer or tokenize more text",
                     tokens->path, (long long)count, (long long)first, (long long)tokens->count);
  }
  int64_t *piece = calloc(PIECE, sizeof *piece);
  if (!piece) return error_set(error, ERROR_WORK, "%s: out of memory", tokens->path);
  for (int64_t done = 0; done < count && !failed; done += PIECE) {
    int64_t length = count - done < PIECE ? count - done : PIECE;
    failed = piece_read(tokens, first + done, length, limit, piece, error);
    for (int64_t i = 0; i < length && !failed; i++) ids[done + i] = (int32_t)piece[i];
  }
  free(piece);
  return failed;
}

/* Feeds all ids to the hash. */
static int hash_update(struct tokens *tokens, struct sha256 *hash, struct error *error) {
  int64_t *ids = calloc(PIECE, sizeof *ids);
  unsigned char *bytes = malloc(PIECE * 4);
  if (!ids || !bytes) error_set(error, ERROR_WORK, "%s: out of memory", tokens->path);
  for (int64_t first = 0; first < tokens->count && !error->code; first += PIECE) {
    int64_t length = tokens->count - first < PIECE ? tokens->count - first : PIECE;
    if (piece_read(tokens, first, length, (int64_t)1 << 32, ids, error)) break;
    for (int64_t i = 0; i < length * 4; i++) bytes[i] = (unsigned char)(ids[i / 4] >> (8 * (i % 4)));
    sha256_update(hash, bytes, (size_t)length * 4, error);
  }
  free(bytes);
  free(ids);
  return error->code;
}

int tokens_sha256(struct tokens *tokens, char hex[65], struct error *error) {
  uint8_t digest[SHA256_BYTES];
  struct sha256 *hash = sha256_open(tokens->path, error);
  if (hash) hash_update(tokens, hash, error);
  if (!sha256_close(hash, digest, error)) sha256_text(digest, hex);
  return error->code;
}

void tokens_close(struct tokens *tokens) {
  if (!tokens) return;
  hdf5_enter();
  hdf5_close(tokens->dataset);
  hdf5_close(tokens->file);
  hdf5_leave();
  free(tokens->path);
  free(tokens);
}
