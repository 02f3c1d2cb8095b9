/* streams.c: writing and finding checkpoints of hidden states. */
#include "streams.h"

#include <dirent.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "file.h"
#include "model.h"
#include "printable.h"
#include "safetensors.h"
#include "sha256.h"

/* A checkpoint being written. */
struct streams_writing {
  char *path;
  int arrays; /* two a sample: x_fp, x_q */
  int *sample;
  size_t array_bytes;
  float *values; /* [arrays, elements] */
  uint8_t identity[SHA256_BYTES];
  pthread_t thread;
  struct error error;
};

static const char FOLDER[] = "streams", ENDING[] = ".safetensors";

/* ---- names ---- */

struct array_name {
  char text[32];
};

static struct array_name array_name(int array, int sample) {
  struct array_name name;
  snprintf(name.text, sizeof name.text, "%s.%d", array % 2 ? "x_q" : "x_fp", sample);
  return name;
}

/* OUT/streams/NNNN, or OUT/streams for ABSENT; freed by the caller. */
static char *folder_of(const struct streams *streams, int block, struct error *error) {
  char name[64];
  snprintf(name, sizeof name, "%s/%04d", FOLDER, block);
  if (block == ABSENT) name[sizeof FOLDER - 1] = 0;
  return path_join(streams->output, name, error);
}

/* Tells of which run and block a file is. */
static int identity_of(const struct streams *streams, int block, uint8_t identity[SHA256_BYTES], struct error *error) {
  const struct store_info *info = streams->info;
  char place[64];
  snprintf(place, sizeof place, "%d %d %lld", info->first_block, block, (long long)streams->elements);
  const char *const texts[] = {info->recipe, info->model_config, info->tokens_sha256, info->model_sha256, place};
  struct sha256 *hash = sha256_open(streams->output, error);
  for (size_t i = 0; hash && i < sizeof texts / sizeof *texts && !error->code; i++)
    sha256_update(hash, texts[i], strlen(texts[i]) + 1, error);
  return sha256_close(hash, identity, error);
}

/* ---- writing ---- */

static int out_of_memory(const struct streams *streams, struct error *error) {
  return error_set(error, ERROR_WORK, "%s: out of memory for a checkpoint of the streams", streams->output);
}

static void writing_free(struct streams_writing *w) {
  if (!w) return;
  free(w->path);
  free(w->sample);
  free(w->values);
  free(w);
}

static int add_tensor(json_t *header, const char *name, const char *dtype, int64_t rows, int64_t columns, size_t *offset, size_t bytes) {
  json_t *entry = json_pack("{s:s, s:[I, I], s:[I, I]}", "dtype", dtype, "shape", (json_int_t)rows, (json_int_t)columns, "data_offsets",
                            (json_int_t)*offset, (json_int_t)*offset + (json_int_t)bytes);
  *offset += bytes;
  return json_object_set_new(header, name, entry);
}

/* The header's text with its length in front; freed by the caller, NULL without memory. */
static char *header_make(const struct streams_writing *w, size_t *length) {
  json_t *header = json_object();
  size_t offset = 0, sums = (size_t)w->arrays * SHA256_BYTES;
  bool failed = add_tensor(header, "identity", "U8", 1, SHA256_BYTES, &offset, SHA256_BYTES) ||
                add_tensor(header, "sha256", "U8", w->arrays, SHA256_BYTES, &offset, sums);
  for (int i = 0; i < w->arrays && !failed; i++)
    failed = add_tensor(header, array_name(i, w->sample[i / 2]).text, "F32", 1, (int64_t)(w->array_bytes / sizeof(float)), &offset,
                        w->array_bytes);
  char *text = failed ? NULL : json_dumps(header, JSON_COMPACT), *whole = NULL;
  json_decref(header);
  *length = text ? strlen(text) + 8 : 0;
  if (text) whole = malloc(*length);
  for (int i = 0; whole && i < 8; i++) whole[i] = (char)((*length - 8) >> (8 * i));
  if (whole) memcpy(whole + 8, text, *length - 8);
  free(text);
  return whole;
}

static int sums_write(struct output_file *file, const struct streams_writing *w, struct error *error) {
  for (int i = 0; i < w->arrays && !error->code; i++) {
    uint8_t sum[SHA256_BYTES];
    struct sha256 *hash = sha256_open(w->path, error);
    if (hash) sha256_update(hash, (const char *)w->values + (size_t)i * w->array_bytes, w->array_bytes, error);
    if (!sha256_close(hash, sum, error)) output_write(file, sum, sizeof sum, error);
  }
  return error->code;
}

static void *writing_main(void *argument) {
  struct streams_writing *w = argument;
  struct output_file file;
  struct error *error = &w->error;
  size_t length;
  char *header = header_make(w, &length);
  if (!header) {
    error_set(error, ERROR_WORK, "%s: out of memory", w->path);
  } else if (!output_open(&file, w->path, error)) {
    bool written = !output_write(&file, header, length, error) && !output_write(&file, w->identity, sizeof w->identity, error) &&
                   !sums_write(&file, w, error) && !output_write(&file, w->values, (size_t)w->arrays * w->array_bytes, error);
    if (written)
      output_commit(&file, error);
    else
      output_abandon(&file);
  }
  free(header);
  return NULL;
}

/* The samples as they are now. */
static int values_take(const struct streams *streams, struct streams_writing *w, struct samples *x_fp, struct samples *x_q,
                       struct error *error) {
  int count = streams->shard->count;
  w->arrays = 2 * count;
  w->array_bytes = (size_t)streams->elements * sizeof(float);
  w->sample = calloc((size_t)count + 1, sizeof *w->sample);
  w->values = malloc((size_t)w->arrays * w->array_bytes + 1);
  if (!w->sample || !w->values) return out_of_memory(streams, error);
  for (int i = 0; i < count; i++) {
    float *values = w->values + 2 * i * streams->elements;
    w->sample[i] = shard_sample(streams->shard, i);
    streams->k->fetch(streams->k, values, samples_read(x_fp, i), streams->elements);
    streams->k->fetch(streams->k, values + streams->elements, samples_read(x_q, i), streams->elements);
  }
  return 0;
}

int streams_save(struct streams *streams, int block, struct samples *x_fp, struct samples *x_q, struct error *error) {
  struct streams_writing *w = calloc(1, sizeof *w);
  char name[32], *folder = folder_of(streams, block, error);
  size_t made;
  snprintf(name, sizeof name, "rank-%05d%s", streams->rank, ENDING);
  if (!w) out_of_memory(streams, error);
  if (!error->code && !folder_make(folder, &made, error)) w->path = path_join(folder, name, error);
  free(folder);
  if (!error->code) identity_of(streams, block, w->identity, error);
  if (!error->code) values_take(streams, w, x_fp, x_q, error);
  if (!error->code && pthread_create(&w->thread, NULL, writing_main, w))
    error_set(error, ERROR_WORK, "%s: no thread for a checkpoint of the streams", streams->output);
  if (error->code)
    writing_free(w);
  else
    streams->writing = w;
  return error->code;
}

int streams_settle(struct streams *streams, struct error *error) {
  struct streams_writing *w = streams->writing;
  if (!w) return 0;
  streams->writing = NULL;
  pthread_join(w->thread, NULL);
  int code = w->error.code ? error_set(error, w->error.code, "%s", w->error.message) : 0;
  writing_free(w);
  return code;
}

/* ---- the folders ---- */

/* The block of a checkpoint's folder; ABSENT for another name. */
static int block_of(const char *name) {
  return strlen(name) == 4 && strspn(name, "0123456789") == 4 ? atoi(name) : ABSENT;
}

static bool is_ours(const char *name) {
  size_t length = strlen(name), ending = sizeof ENDING - 1;
  return strncmp(name, "rank-", 5) == 0 && length > ending && strcmp(name + length - ending, ENDING) == 0;
}

static void folder_remove(const char *folder) {
  struct dirent *entry;
  folder_sweep(folder);
  DIR *stream = opendir(folder);
  while (stream && (entry = readdir(stream)))
    if (is_ours(entry->d_name)) unlinkat(dirfd(stream), entry->d_name, 0);
  if (stream) closedir(stream);
  rmdir(folder);
}

void streams_sweep(const struct streams *streams, int block) {
  struct error ignored = {0};
  char *all = folder_of(streams, ABSENT, &ignored);
  DIR *stream = all ? opendir(all) : NULL;
  struct dirent *entry;
  while (stream && (entry = readdir(stream))) {
    int of = block_of(entry->d_name);
    char *folder = of == ABSENT || of == block ? NULL : folder_of(streams, of, &ignored);
    if (folder) folder_remove(folder);
    free(folder);
  }
  if (stream) closedir(stream);
  if (block == ABSENT && all) rmdir(all);
  free(all);
}

/* ---- reading ---- */

/* Calls `visit` for each file of this run's checkpoint of a block that can be opened; others are passed over. */
static void files_visit(const struct streams *streams, int block, void (*visit)(void *context, const struct safetensors *file),
                        void *context) {
  struct error ignored = {0};
  uint8_t identity[SHA256_BYTES], there[SHA256_BYTES];
  char *folder = folder_of(streams, block, &ignored);
  DIR *stream = folder && !identity_of(streams, block, identity, &ignored) ? opendir(folder) : NULL;
  struct dirent *entry;
  while (stream && (entry = readdir(stream))) {
    struct error damaged = {0};
    struct safetensors *file = NULL;
    char *path = is_ours(entry->d_name) ? path_join(folder, entry->d_name, &damaged) : NULL;
    if (path && !safetensors_open_file(path, &file, &damaged)) {
      const struct tensor *tensor = safetensors_find(file, "identity");
      if (tensor && tensor->bytes == SHA256_BYTES && !safetensors_read(tensor, 0, SHA256_BYTES, there, &damaged) &&
          memcmp(identity, there, SHA256_BYTES) == 0)
        visit(context, file);
    }
    safetensors_close(file);
    free(path);
  }
  if (stream) closedir(stream);
  free(folder);
}

/* What this rank still lacks of its samples. */
struct search {
  const struct streams *streams;
  bool *found; /* [2 * shard->count] */
  int missing;
  struct samples *x[2]; /* where samples are read to; NULL: only looked for */
  float *values;        /* one sample */
};

static bool sum_matches(const struct safetensors *file, const struct tensor *tensor, const float *values) {
  /* Arrays stand in the order of their sums behind these. */
  struct error error = {0};
  uint8_t want[SHA256_BYTES], got[SHA256_BYTES];
  const struct tensor *sums = safetensors_find(file, "sha256");
  if (!sums || tensor->offset < sums->offset + sums->bytes) return false;
  size_t row = (tensor->offset - sums->offset - sums->bytes) / tensor->bytes;
  if ((row + 1) * SHA256_BYTES > sums->bytes || safetensors_read(sums, row * SHA256_BYTES, SHA256_BYTES, want, &error)) return false;
  struct sha256 *hash = sha256_open(tensor->path, &error);
  if (hash) sha256_update(hash, values, tensor->bytes, &error);
  return !sha256_close(hash, got, &error) && memcmp(want, got, SHA256_BYTES) == 0;
}

static bool array_read(struct search *search, const struct safetensors *file, const struct tensor *tensor, int array) {
  struct error error = {0};
  const struct streams *streams = search->streams;
  if (!search->x[0]) return true;
  if (safetensors_read(tensor, 0, tensor->bytes, search->values, &error) || !sum_matches(file, tensor, search->values)) return false;
  streams->k->load(streams->k, samples_write(search->x[array % 2], array / 2), search->values, DTYPE_F32, streams->elements);
  return true;
}

static void search_file(void *context, const struct safetensors *file) {
  struct search *search = context;
  const struct streams *streams = search->streams;
  for (int i = 0; i < 2 * streams->shard->count; i++) {
    const struct tensor *tensor = safetensors_find(file, array_name(i, shard_sample(streams->shard, i / 2)).text);
    if (search->found[i] || !tensor || tensor->dtype != DTYPE_F32 || tensor->bytes != (size_t)streams->elements * sizeof(float)) continue;
    if (!array_read(search, file, tensor, i)) continue;
    search->found[i] = true;
    search->missing--;
  }
}

/* Whether all of this rank's samples are there; read into x_fp and x_q unless these are NULL. */
static bool search_all(const struct streams *streams, int block, struct samples *x_fp, struct samples *x_q) {
  int arrays = 2 * streams->shard->count;
  struct search search = {.streams = streams,
                          .found = calloc((size_t)arrays + 1, sizeof *search.found),
                          .missing = arrays,
                          .x = {x_fp, x_q},
                          .values = malloc((size_t)streams->elements * sizeof *search.values)};
  if (search.found && search.values) files_visit(streams, block, search_file, &search);
  bool whole = search.found && search.values && search.missing == 0;
  free(search.found);
  free(search.values);
  return whole;
}

int streams_latest(const struct streams *streams, int most) {
  struct error ignored = {0};
  struct dirent *entry;
  int latest = 0;
  char *folder = folder_of(streams, ABSENT, &ignored);
  if (streams->shard->count == 0) latest = most; /* whatever the others have */
  DIR *stream = folder ? opendir(folder) : NULL;
  while (stream && (entry = readdir(stream))) {
    int block = block_of(entry->d_name);
    if (block > latest && block <= most && search_all(streams, block, NULL, NULL)) latest = block;
  }
  if (stream) closedir(stream);
  free(folder);
  return latest;
}

int streams_load(const struct streams *streams, int block, struct samples *x_fp, struct samples *x_q, struct error *error) {
  if (streams->shard->count == 0 || search_all(streams, block, x_fp, x_q)) return 0;
  return error_set(error, ERROR_INPUT, "%s/%s/%04d: not all of this rank's samples are there, whole and of this run", streams->output,
                   FOLDER, block);
}
