/* samples.c: where samples live, and the two windows. Copies are ordered by events on the device; the host never waits. */
#include "samples.h"

static size_t sample_bytes(const struct samples *s) {
  return (size_t)s->elements * s->k->element_bytes;
}

/* From one to the next. On a device each begins as an allocation does: libraries choose how to compute by how an operand is aligned, which must not hang
 * on how many samples lie before it, and so on the number of ranks. */
static size_t stride_bytes(const struct samples *s) {
  const size_t aligned = 256, bytes = sample_bytes(s);
  return s->k->owns ? (bytes + aligned - 1) / aligned * aligned : bytes;
}

static size_t all_bytes(const struct samples *s) {
  return (size_t)s->count * stride_bytes(s);
}

static int out_of_memory(const struct samples *s, struct error *error) {
  return error_set(error, ERROR_WORK, "rank %d: out of memory on %s for %d samples (%zu bytes); lower --samples or use more ranks", s->rank,
                   s->k->name, s->count, all_bytes(s));
}

int samples_init(struct samples *s, struct kernels *k, int count, int64_t elements, int rank, struct error *error) {
  *s = (struct samples){.k = k, .count = count, .elements = elements, .rank = rank, .window = {{.sample = -1}, {.sample = -1}}};
  for (int i = 0; i < 2 && k->owns && count > 0; i++) {
    s->window[i].at = k->allocate(k, sample_bytes(s));
    if (!s->window[i].at) return out_of_memory(s, error);
  }
  return 0;
}

static void windows_free(struct samples *s) {
  for (int i = 0; i < 2 && s->window[i].at; i++) {
    s->k->lane_close(s->k, s->window[i].lane);
    s->k->release(s->k, s->window[i].at);
    s->window[i] = (struct sample_window){.sample = -1};
  }
}

static int place_on_host(struct samples *s, struct error *error) {
  s->host = s->k->allocate_host(s->k, all_bytes(s));
  for (int i = 0; i < 2 && s->host; i++)
    if (!(s->window[i].lane = s->k->lane_open(s->k))) return out_of_memory(s, error);
  return s->host ? 0 : out_of_memory(s, error);
}

int samples_place(struct samples *s, struct error *error) {
  if (s->window[0].at && s->k->room(s->k) < all_bytes(s)) return place_on_host(s, error);
  windows_free(s);
  s->all = s->k->allocate(s->k, all_bytes(s));
  return s->all ? 0 : out_of_memory(s, error);
}

void samples_free(struct samples *s) {
  if (!s->k) return;
  windows_free(s);
  if (s->all) s->k->release(s->k, s->all);
  if (s->host) s->k->release_host(s->k, s->host);
  *s = (struct samples){0};
}

/* Beside the work from here on the window gives back what was changed and, where `fetched`, gets the sample. */
static void window_turn(struct samples *s, struct sample_window *window, int sample, bool fetched) {
  struct kernels *k = s->k;
  size_t bytes = sample_bytes(s), stride = stride_bytes(s);
  k->follow(k, window->lane);
  if (window->changed) k->send(k, window->lane, s->host + (size_t)window->sample * stride, window->at, bytes);
  if (fetched && window->sample != sample) k->send(k, window->lane, window->at, s->host + (size_t)sample * stride, bytes);
  window->sample = sample;
  window->changed = false;
}

/* A sample that has been given back comes again behind that copy: by the same window, whose lane keeps the order, or by the other one, which follows
 * work that has joined the first one's lane. */
static data *take(struct samples *s, int sample, bool fetched, bool changed) {
  if (s->all) return data_at(s->k, s->all, sample * (int64_t)(stride_bytes(s) / s->k->element_bytes));
  int next = (sample + 1) % s->count;
  if (s->window[s->latest].sample != sample) s->latest = !s->latest;
  struct sample_window *window = &s->window[s->latest], *other = &s->window[!s->latest];
  if (window->sample != sample) window_turn(s, window, sample, fetched);
  s->k->join(s->k, window->lane);
  window->changed = window->changed || changed;
  if (fetched && next != sample && other->sample != next)
    window_turn(s, other, next, true);
  else if (other->changed)
    window_turn(s, other, other->sample, false);
  return window->at;
}

data *samples_read(struct samples *s, int sample) {
  return take(s, sample, true, false);
}

data *samples_write(struct samples *s, int sample) {
  return take(s, sample, false, true);
}

data *samples_change(struct samples *s, int sample) {
  return take(s, sample, true, true);
}

void samples_copy(struct samples *to, struct samples *from) {
  if (to->all && from->all) {
    to->k->copy(to->k, to->all, from->all, all_bytes(to));
    return;
  }
  for (int i = 0; i < to->count; i++) to->k->copy(to->k, samples_write(to, i), samples_read(from, i), sample_bytes(to));
}
