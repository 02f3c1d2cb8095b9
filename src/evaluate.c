/* evaluate.c: perplexity, with the blocks and then the head streamed past each rank's windows. */
#include "evaluate.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "block.h"
#include "checkpoint.h"
#include "clock.h"
#include "dequantize.h"
#include "device.h"
#include "feed.h"
#include "stream.h"

struct evaluation {
  struct world *world;
  const struct evaluate_options *options;
  int windows; /* of all ranks */

  /* rank 0 */
  struct checkpoint *checkpoint;
  struct store *store;
  struct tokens *tokens;
  int64_t *start; /* [windows] first token of each */

  /* every rank */
  struct model model; /* with the types that the stream carries */
  struct activation_quantizer activations;
  struct kernels *k;
  int count;                /* this rank's windows */
  struct samples x;         /* [T, hidden] each */
  struct samples projected; /* [T, embedding] each, where that is not as wide */
  struct samples *last;     /* which of them the head reads */
  int32_t *ids;             /* [count, T] host */
  struct shared weights;    /* of the block, as the ranks of a node have them in common */
  struct block block;
  struct stream *stream;
  double nll; /* sum of this rank's windows' means */

  /* head */
  int64_t piece;                /* vocabulary entries an item */
  data *weight, *logits;        /* [piece, embedding] or what stands before the head, [T, piece] */
  int32_t *target;              /* [count, T] device */
  struct cross_entropy entropy; /* [count * T] */
};

/* ---- rank 0: input ---- */

static int choose_windows(struct evaluation *e, struct error *error) {
  const struct evaluate_options *options = e->options;
  int64_t count = tokens_count(e->tokens), fitting = (count - options->offset) / options->seqlen;
  e->windows = options->windows ? options->windows : (int)(fitting < 1 << 30 ? fitting : 1 << 30);
  if (options->offset >= count || fitting < 1 || fitting < options->windows)
    return error_set(
        error, ERROR_INPUT,
        "%s: tokens: %lld are there; from --offset %lld on that is not enough for %d windows of %d; give more text or lower --windows",
        options->tokens, (long long)count, (long long)options->offset, options->windows ? options->windows : 1, options->seqlen);
  e->start = calloc((size_t)e->windows, sizeof *e->start);
  if (!e->start) return error_set(error, ERROR_WORK, "out of memory for the windows");
  for (int i = 0; i < e->windows; i++) e->start[i] = options->offset + (int64_t)i * options->seqlen;
  return 0;
}

static int open_files(struct evaluation *e, struct error *error) {
  const struct evaluate_options *options = e->options;
  if (checkpoint_open(options->model, &e->model, &e->checkpoint, error)) return error->code;
  if (model_check_seqlen(&e->model, options->seqlen, options->model, error)) return error->code;
  if (tokens_open(options->tokens, &e->tokens, error) || choose_windows(e, error)) return error->code;
  if (!options->quantized) return 0;
  if (store_open(options->quantized, &e->store, error)) return error->code;
  if (store_info(e->store)->blocks != e->model.blocks)
    return error_set(error, ERROR_INPUT, "%s: it holds a model of %d blocks, %s has %d; give the model it was made from",
                     options->quantized, store_info(e->store)->blocks, options->model, e->model.blocks);
  for (int i = 0; i < e->model.blocks; i++)
    if (!store_has_block(e->store, i))
      return error_set(error, ERROR_INPUT, "%s: block %d is not there; its calibration did not end", options->quantized, i);
  model_widen(&e->model);
  return 0;
}

/* Activations as the recipe of the store says, unless flags say otherwise. */
static int choose_activations(struct evaluation *e, struct error *error) {
  const struct evaluate_options *options = e->options;
  struct recipe recipe;
  recipe_init(&recipe);
  if (e->store && recipe_from_json(&recipe, store_info(e->store)->recipe, options->quantized, error)) return error->code;
  e->activations = recipe.activations;
  if (options->abits) e->activations.abits = options->abits;
  if (options->kv_bits) e->activations.kv_bits = options->kv_bits;
  e->activations.kv_bits = recipe_kv_bits(&e->activations);
  return 0;
}

static bool quantizes_activations(const struct evaluation *e) {
  return e->activations.abits < 16 || e->activations.kv_bits < 16;
}

/* ---- the stream's items: blocks, what stands between them and the head, pieces of the head ---- */

/* The item between, all floats: the final norm's weight and bias and the projection, of what the model has. */
struct tail {
  int64_t norm, bias, projection, count; /* where each begins; ABSENT; of all */
};

static struct tail tail_of(const struct model *model) {
  struct tail tail = {ABSENT, ABSENT, ABSENT, 0};
  int64_t H = model->hidden, E = model->embedding;
  if (model->final_norm) {
    tail.norm = 0;
    tail.count = H;
  }
  if (model->final_norm && model->layer_norm) {
    tail.bias = tail.count;
    tail.count += H;
  }
  if (E != H) {
    tail.projection = tail.count;
    tail.count += E * H;
  }
  return tail;
}

static int64_t piece_rows(const struct evaluation *e, int item) {
  int64_t first = (item - e->model.blocks - 1) * e->piece, left = e->model.vocabulary - first;
  return left < e->piece ? left : e->piece;
}

static size_t item_bytes(const void *context, int item) {
  const struct evaluation *e = context;
  if (item < e->model.blocks) return e->model.image_bytes;
  int64_t count = item == e->model.blocks ? tail_of(&e->model).count : piece_rows(e, item) * e->model.embedding;
  return (size_t)count * sizeof(float);
}

static int read_tail(const struct evaluation *e, float *out, struct error *error) {
  struct tail tail = tail_of(&e->model);
  if (tail.norm != ABSENT && checkpoint_read_final_norm(e->checkpoint, out + tail.norm, error)) return error->code;
  if (tail.bias != ABSENT && checkpoint_read_final_norm_bias(e->checkpoint, out + tail.bias, error)) return error->code;
  return tail.projection != ABSENT ? checkpoint_read_project_out(e->checkpoint, out + tail.projection, error) : 0;
}

static int read_item(void *context, int item, void *buffer, struct error *error) {
  struct evaluation *e = context;
  if (item < e->model.blocks && e->store)
    return dequantize_read_block(e->store, e->checkpoint, &e->model, item, buffer, e->options->quantized, error);
  if (item < e->model.blocks) return checkpoint_read_block(e->checkpoint, &e->model, item, buffer, error);
  if (item == e->model.blocks) return read_tail(e, buffer, error);
  return checkpoint_read_head(e->checkpoint, (item - e->model.blocks - 1) * e->piece, piece_rows(e, item), buffer, error);
}

/* ---- every rank: memory ---- */

static int window_owner(const void *context, int window) {
  return window % ((const struct evaluation *)context)->world->size;
}

static void *device_memory(struct evaluation *e, size_t bytes, struct error *error) {
  void *memory = error->code ? NULL : e->k->allocate(e->k, bytes);
  if (!memory)
    error_set(error, ERROR_WORK, "rank %d: out of memory on %s (%zu bytes); lower --windows or use more ranks", e->world->rank, e->k->name,
              bytes);
  return memory;
}

static int open_device(struct evaluation *e, struct error *error) {
  e->k = kernels_open(e->options->backend, world_threads(e->world, e->options->threads), e->world->local_rank, error);
  if (world_agree(e->world, error)) return error->code;
  device_open(e->world, e->k, error);
  return world_agree(e->world, error);
}

static int open_work(struct evaluation *e, struct error *error) {
  int64_t T = e->options->seqlen, H = e->model.hidden, E = e->model.embedding, before = tail_of(&e->model).count;
  int64_t budget = 8 << 20; /* elements of a piece of the head, and of its logits */
  struct block_use use = {.tokens = e->options->seqlen, .quantized_inputs = quantizes_activations(e)};
  e->piece = budget / (E > T ? E : T);
  if (e->piece > e->model.vocabulary) e->piece = e->model.vocabulary;
  if (e->piece < 1) e->piece = 1;
  int items = e->model.blocks + 1 + (int)((e->model.vocabulary + e->piece - 1) / e->piece);
  struct stream_source source = {items, item_bytes, read_item, e};
  stream_open(e->world, e->k, device_stream_link(e->world), &source, &e->stream, error);
  if (world_agree(e->world, error)) return error->code;
  /* Collective; what follows may fail on one rank alone. */
  if (!e->k->owns) shared_open(&e->weights, e->world, (size_t)e->model.elements * e->k->element_bytes);
  use.weights_in = e->weights;
  for (int i = 0; i < e->windows; i++) e->count += window_owner(e, i) == e->world->rank;
  size_t tokens = (size_t)e->count * (size_t)T;
  e->ids = calloc(tokens + 1, sizeof *e->ids);
  if (!e->ids) return error_set(error, ERROR_WORK, "rank %d: out of memory for the windows", e->world->rank);
  e->last = E == H ? &e->x : &e->projected;
  if (samples_init(&e->x, e->k, e->count, T * H, e->world->rank, error) ||
      (E != H && samples_init(&e->projected, e->k, e->count, T * E, e->world->rank, error)))
    return error->code;
  e->weight = device_memory(e, (size_t)(e->piece * E > before ? e->piece * E : before) * e->k->element_bytes, error);
  e->logits = device_memory(e, (size_t)(e->piece * T) * e->k->element_bytes, error);
  e->target = device_memory(e, tokens * sizeof *e->target, error);
  e->entropy.maximum = device_memory(e, tokens * sizeof(float), error);
  e->entropy.sum = device_memory(e, tokens * sizeof(float), error);
  e->entropy.target = device_memory(e, tokens * sizeof(float), error);
  if (error->code || block_init(&e->block, &e->model, e->k, &use, error)) return error->code;
  e->block.quantizer = e->activations;
  if (samples_place(&e->x, error)) return error->code;
  return E != H ? samples_place(&e->projected, error) : 0;
}

static void evaluation_free(struct evaluation *e) {
  stream_close(e->stream);
  device_close(e->world);
  store_close(e->store, &(struct error){0});
  tokens_close(e->tokens);
  checkpoint_close(e->checkpoint);
  free(e->start);
  free(e->ids);
  if (!e->k) return;
  samples_free(&e->x);
  samples_free(&e->projected);
  void *const device[] = {e->weight, e->logits, e->target, e->entropy.maximum, e->entropy.sum, e->entropy.target};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++) e->k->release(e->k, device[i]);
  block_free(&e->block);
  shared_close(&e->weights);
  e->k->close(e->k);
}

/* ---- the work ---- */

static int next_item(struct evaluation *e, const void **bytes, struct error *error) {
  stream_next(e->stream, bytes, error);
  return world_agree(e->world, error);
}

static int pass_block(struct evaluation *e, struct error *error) {
  enum block_weights which = quantizes_activations(e) ? BLOCK_QUANTIZED : BLOCK_FULL; /* the weights are the same */
  const void *image;
  if (next_item(e, &image, error)) return error->code;
  block_load(&e->block, image);
  stream_release(e->stream);
  for (int i = 0; i < e->count; i++) {
    data *x = samples_change(&e->x, i);
    block_forward(&e->block, which, x, x);
    stream_poll(e->stream);
  }
  return 0;
}

/* The final norm and the projection, of what the model has. */
static int pass_tail(struct evaluation *e, struct error *error) {
  const void *floats;
  struct tail tail = tail_of(&e->model);
  struct kernels *k = e->k;
  int64_t T = e->options->seqlen, H = e->model.hidden, E = e->model.embedding;
  if (next_item(e, &floats, error)) return error->code;
  k->load(k, e->weight, floats, DTYPE_F32, tail.count);
  stream_release(e->stream);
  struct norm_shape shape = {T, H, e->model.norm_eps, e->model.layer_norm};
  const data *bias = tail.bias != ABSENT ? data_at(k, e->weight, tail.bias) : NULL;
  for (int i = 0; i < e->count; i++) {
    data *x = samples_change(&e->x, i);
    if (tail.norm != ABSENT) k->norm_forward(k, x, x, data_at(k, e->weight, tail.norm), bias, &shape);
    if (tail.projection != ABSENT)
      k->linear_forward(k, samples_write(&e->projected, i), x, data_at(k, e->weight, tail.projection), NULL, T, H, E, false);
  }
  return 0;
}

/* The last token of a window predicts nothing: its target is in no piece. */
static int start_entropy(struct evaluation *e, struct error *error) {
  int64_t T = e->options->seqlen, tokens = e->count * T;
  int32_t *target = malloc((size_t)(tokens + 1) * sizeof *target);
  if (!target) return error_set(error, ERROR_WORK, "rank %d: out of memory for the windows", e->world->rank);
  for (int64_t t = 0; t < tokens; t++) target[t] = t % T == T - 1 ? -1 : e->ids[t + 1];
  e->k->upload(e->k, e->target, target, (size_t)tokens * sizeof *target);
  e->k->fill(e->k, e->entropy.maximum, -INFINITY, tokens);
  free(target);
  return 0;
}

static int pass_head_piece(struct evaluation *e, int64_t first, int64_t rows, struct error *error) {
  const void *weight;
  int64_t T = e->options->seqlen, E = e->model.embedding;
  if (next_item(e, &weight, error)) return error->code;
  e->k->load(e->k, e->weight, weight, DTYPE_F32, rows * E);
  stream_release(e->stream);
  for (int i = 0; i < e->count; i++) {
    struct cross_entropy state = {e->entropy.maximum + i * T, e->entropy.sum + i * T, e->entropy.target + i * T};
    e->k->linear_forward(e->k, e->logits, samples_read(e->last, i), e->weight, NULL, T, E, rows, false);
    e->k->cross_entropy_piece(e->k, &state, e->logits, e->target + i * T, T, first, rows);
    stream_poll(e->stream);
  }
  return 0;
}

static int sum_entropy(struct evaluation *e, struct error *error) {
  int64_t T = e->options->seqlen;
  size_t tokens = (size_t)e->count * (size_t)T, bytes = tokens * sizeof(float);
  float *host = malloc(3 * bytes + 1);
  if (!host) return error_set(error, ERROR_WORK, "rank %d: out of memory for the windows", e->world->rank);
  const float *maximum = host, *sum = host + tokens, *target = host + 2 * tokens;
  e->k->download(e->k, host, e->entropy.maximum, bytes);
  e->k->download(e->k, host + tokens, e->entropy.sum, bytes);
  e->k->download(e->k, host + 2 * tokens, e->entropy.target, bytes);
  for (int i = 0; i < e->count; i++) {
    double nll = 0;
    for (int64_t t = i * T; t < (i + 1) * T - 1; t++) nll += (double)maximum[t] + log((double)sum[t]) - (double)target[t];
    e->nll += nll / (double)(T - 1);
  }
  free(host);
  return e->k->synchronize(e->k, error);
}

/* ", A6", ", A8 KV4" or nothing. */
static void activations_text(const struct evaluation *e, char text[32]) {
  int abits = e->activations.abits, kv_bits = e->activations.kv_bits;
  *text = 0;
  if (quantizes_activations(e) && abits == kv_bits) snprintf(text, 32, ", A%d", abits);
  if (abits != kv_bits) snprintf(text, 32, ", A%d KV%d", abits, kv_bits);
}

static void print_result(const struct evaluation *e, double perplexity, double seconds, double memory) {
  const struct evaluate_options *options = e->options;
  const char *quantized = options->quantized ? options->quantized : "full precision";
  char activations[32];
  activations_text(e, activations);
  if (!options->json) {
    printf("perplexity %.4f  (%s%s, %d windows of %d tokens, %.1f s, peak memory %.0f MiB a rank)\n", perplexity, quantized, activations,
           e->windows, options->seqlen, seconds, memory);
    return;
  }
  json_t *object = json_pack("{s:f, s:s, s:s?, s:i, s:i, s:i, s:i, s:I, s:i, s:f, s:f}", "perplexity", perplexity, "model", options->model,
                             "quantized", options->quantized, "abits", e->activations.abits, "kv_bits", e->activations.kv_bits, "windows",
                             e->windows, "seqlen", options->seqlen, "offset", (json_int_t)options->offset, "ranks", e->world->size,
                             "seconds", seconds, "peak_rss_mib", memory);
  if (object) json_dumpf(object, stdout, JSON_INDENT(2));
  printf("\n");
  json_decref(object);
}

static int evaluate_all(struct evaluation *e, struct error *error) {
  double begin = now();
  if (e->world->rank == 0 && !open_files(e, error)) choose_activations(e, error);
  if (world_agree(e->world, error)) return error->code;
  world_broadcast(e->world, &e->model, sizeof e->model);
  world_broadcast(e->world, &e->activations, sizeof e->activations);
  world_broadcast(e->world, &e->windows, sizeof e->windows);
  if (open_device(e, error)) return error->code;
  open_work(e, error);
  if (world_agree(e->world, error)) return error->code;
  struct feed feed = {e->world, e->k, &e->model, e->tokens, e->checkpoint, e->options->seqlen, e->windows, e->start, window_owner, e};
  if (feed_embed(&feed, &e->x, e->ids, error)) return error->code;
  start_entropy(e, error);
  if (world_agree(e->world, error)) return error->code;
  stream_start(e->stream, 0);
  for (int i = 0; i < e->model.blocks; i++)
    if (pass_block(e, error)) return error->code;
  if (pass_tail(e, error)) return error->code;
  for (int64_t first = 0; first < e->model.vocabulary; first += e->piece) {
    int64_t left = e->model.vocabulary - first;
    if (pass_head_piece(e, first, left < e->piece ? left : e->piece, error)) return error->code;
  }
  sum_entropy(e, error);
  if (world_agree(e->world, error)) return error->code;
  double perplexity = exp(world_sum(e->world, e->nll) / e->windows);
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  double memory = world_max(e->world, (double)usage.ru_maxrss / 1024);
  if (e->world->rank == 0) print_result(e, perplexity, now() - begin, memory);
  return 0;
}

int evaluate(struct world *world, const struct evaluate_options *options, struct error *error) {
  struct evaluation evaluation = {.world = world, .options = options};
  evaluate_all(&evaluation, error);
  evaluation_free(&evaluation);
  return world_agree(world, error);
}
