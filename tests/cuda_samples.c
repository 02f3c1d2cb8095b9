/* cuda_samples.c: samples in pinned host memory give what samples on the device give, bit for bit, whatever the order in which they are read, changed
 * and written; and where they are placed. */
#include "cuda_pair.h"
#include "samples.h"

enum { ELEMENTS = 1000, PASSES = 4, MOST_SEEN = 100 };

static size_t no_room(struct kernels *k) {
  (void)k;
  return 0;
}

/* Two arrays of samples, and what the work makes of them. */
struct pair {
  struct memory memory;
  struct kernels *k;
  int count;
  struct samples x, y;
  data *noise; /* [ELEMENTS] */
  data *seen;  /* [MOST_SEEN, ELEMENTS] all that was read */
  int reads;
};

static void pair_open(struct pair *p, struct kernels *k, int count, bool on_host) {
  struct error error = {0};
  size_t (*room)(struct kernels * k) = k->room;
  *p = (struct pair){.memory = {.k = k}, .k = k, .count = count};
  samples_init(&p->x, k, count, ELEMENTS, 0, &error);
  samples_init(&p->y, k, count, ELEMENTS, 0, &error);
  if (on_host) k->room = no_room;
  if (error.code || samples_place(&p->x, &error) || samples_place(&p->y, &error)) fail_msg("%s", error.message);
  k->room = room;
  assert_true(on_host ? p->x.host && !p->x.all : p->x.all && !p->x.host);
  float *nan = poison(&p->memory, ELEMENTS);
  for (int i = 0; i < 2 && on_host; i++) {
    k->load(k, p->x.window[i].at, nan, DTYPE_F32, ELEMENTS);
    k->load(k, p->y.window[i].at, nan, DTYPE_F32, ELEMENTS);
  }
  p->noise = device_data(&p->memory, random_bf16(&p->memory, &(uint64_t){7}, ELEMENTS), ELEMENTS);
  p->seen = device_data(&p->memory, host_floats(&p->memory, (int64_t)MOST_SEEN * ELEMENTS), (int64_t)MOST_SEEN * ELEMENTS);
}

static void pair_close(struct pair *p) {
  samples_free(&p->x);
  samples_free(&p->y);
  memory_free(&p->memory);
}

static void use(struct pair *p, const data *x) {
  assert_true(p->reads < MOST_SEEN);
  p->k->copy(p->k, data_at(p->k, p->seen, p->reads++ * (int64_t)ELEMENTS), x, ELEMENTS * p->k->element_bytes);
}

static void give(struct pair *p, struct samples *to, int sample, uint64_t *state) {
  float *values = random_bf16(&p->memory, state, ELEMENTS);
  p->k->copy(p->k, samples_write(to, sample), device_data(&p->memory, values, ELEMENTS), ELEMENTS * p->k->element_bytes);
}

/* As blocks pass: y from x, and x changed; then they change places. */
static void pass(struct pair *p, int i) {
  data *x = samples_change(&p->x, i), *y = samples_write(&p->y, i);
  p->k->copy(p->k, y, x, ELEMENTS * p->k->element_bytes);
  p->k->accumulate(p->k, y, p->noise, ELEMENTS);
  use(p, samples_read(&p->y, i));
  p->k->accumulate(p->k, x, p->noise, ELEMENTS);
}

static void in_order(struct pair *p, uint64_t *state) {
  (void)state;
  for (int n = 0; n < PASSES; n++) {
    for (int i = 0; i < p->count; i++) pass(p, i);
    for (int i = 0; i < p->count; i++) use(p, samples_read(&p->x, i));
    struct samples before = p->x;
    p->x = p->y;
    p->y = before;
  }
  samples_copy(&p->x, &p->y);
}

static void in_no_order(struct pair *p, uint64_t *state) {
  for (int n = 0; n < 40; n++) {
    int i = (int)(random_bits(state) % (uint64_t)p->count);
    switch (random_bits(state) % 4) {
    case 0:
      use(p, samples_read(&p->x, i));
      break;
    case 1:
      pass(p, i);
      break;
    case 2:
      p->k->accumulate(p->k, samples_change(&p->x, i), p->noise, ELEMENTS);
      break;
    default:
      give(p, &p->x, i, state);
    }
  }
}

/* All that was read, and all that there is at the end: [MOST_SEEN + 2 * count, ELEMENTS]. */
static float *run(struct memory *m, struct kernels *k, int count, bool on_host, void (*order)(struct pair *p, uint64_t *state)) {
  struct pair p;
  struct error error = {0};
  uint64_t state = 3;
  float *out = host_floats(m, (MOST_SEEN + 2 * count) * ELEMENTS), *end = out + MOST_SEEN * ELEMENTS;
  pair_open(&p, k, count, on_host);
  for (int i = 0; i < count; i++) {
    give(&p, &p.x, i, &state);
    give(&p, &p.y, i, &state);
  }
  order(&p, &state);
  for (int i = 0; i < count; i++) {
    k->fetch(k, end + 2 * i * ELEMENTS, samples_read(&p.x, i), ELEMENTS);
    k->fetch(k, end + (2 * i + 1) * ELEMENTS, samples_read(&p.y, i), ELEMENTS);
  }
  k->fetch(k, out, p.seen, (int64_t)MOST_SEEN * ELEMENTS);
  if (k->synchronize(k, &error)) fail_msg("%s", error.message);
  pair_close(&p);
  return out;
}

static struct kernels *open_device(void) {
  struct error error = {0};
  struct kernels *k = CUDA_OPEN(0, &error);
  if (!k) fail_msg("%s", error.message);
  return k;
}

/* Twice: on the emulation once with late copies and once with late work. */
static void the_host_gives_what_the_device_gives(void **context) {
  (void)context;
  for (int again = 0; again < 2; again++) {
    struct kernels *k = open_device();
    for (int count = 1; count <= 5; count++)
      for (int order = 0; order < 2; order++) {
        struct memory m = {.k = k};
        float *want = run(&m, k, count, false, order ? in_no_order : in_order),
              *got = run(&m, k, count, true, order ? in_no_order : in_order);
        assert_memory_equal(got, want, (size_t)(MOST_SEEN + 2 * count) * ELEMENTS * sizeof *got);
        for (int i = 0; i < (MOST_SEEN + 2 * count) * ELEMENTS; i++) assert_true(isfinite(got[i]));
        memory_free(&m);
      }
    k->close(k);
  }
}

/* While one sample is worked on, the next one is on its way, and the one before on its way back. */
static void copies_run_beside_the_work(void **context) {
  (void)context;
  enum { COUNT = 3 };
  struct kernels *k = open_device();
  struct pair p;
  uint64_t state = 3;
  pair_open(&p, k, COUNT, true);
  for (int i = 0; i < 2 * COUNT; i++) {
    give(&p, &p.y, i % COUNT, &state);
    assert_true(p.y.window[p.y.latest].changed && !p.y.window[!p.y.latest].changed);
  }
  samples_copy(&p.x, &p.y);
  for (int i = 0; i < 2 * COUNT; i++) {
    samples_change(&p.x, i % COUNT);
    assert_int_equal(p.x.window[!p.x.latest].sample, (i + 1) % COUNT);
    assert_true(p.x.window[p.x.latest].changed && !p.x.window[!p.x.latest].changed);
  }
  pair_close(&p);
  k->close(k);
}

/* Else cuBLASLt could take another algorithm for a sample that is another rank's first. */
static void samples_are_aligned_alike(void **context) {
  (void)context;
  enum { COUNT = 3 };
  struct kernels *k = open_device();
  for (int on_host = 0; on_host < 2; on_host++) {
    struct pair p;
    pair_open(&p, k, COUNT, on_host);
    for (int i = 0; i < COUNT; i++) assert_int_equal((uintptr_t)samples_write(&p.x, i) % 256, 0);
    pair_close(&p);
  }
  k->close(k);
}

/* Where the device's memory can be chosen, as it can where it is the host's (cuda_emulation.h) and has no end: room for what is held back, the
 * windows of two arrays and one of these. */
static void samples_go_where_there_is_room(void **context) {
  (void)context;
  struct kernels *k = open_device();
  struct error error = {0};
  enum { COUNT = 10 };
  size_t sample = ELEMENTS * k->element_bytes, stride = (sample + 255) / 256 * 256;
  char memory[32];
  if (k->room(k) < SIZE_MAX / 2) {
    k->close(k);
    skip();
  }
  size_t held = SIZE_MAX - k->room(k); /* back from the samples, or taken already */
  for (int lacking = 0; lacking < 2; lacking++) {
    struct samples first, second, third;
    snprintf(memory, sizeof memory, "%zu", held + 4 * sample + COUNT * stride - (size_t)lacking);
    setenv("OMNIQUANT_EMULATED_MEMORY", memory, 1);
    samples_init(&first, k, COUNT, ELEMENTS, 0, &error);
    samples_init(&second, k, COUNT, ELEMENTS, 0, &error);
    samples_init(&third, k, 0, ELEMENTS, 0, &error); /* takes none */
    if (error.code || samples_place(&first, &error) || samples_place(&second, &error) || samples_place(&third, &error))
      fail_msg("%s", error.message);
    assert_true(lacking ? first.host && !first.all : first.all && !first.host);
    assert_true(second.host && !second.all);
    assert_false(third.host);
    samples_free(&first);
    samples_free(&second);
    samples_free(&third);
  }
  unsetenv("OMNIQUANT_EMULATED_MEMORY");
  k->close(k);
}

int main(void) {
  struct kernels *cpu, *cuda;
  const struct CMUnitTest tests[] = {cmocka_unit_test(the_host_gives_what_the_device_gives), cmocka_unit_test(copies_run_beside_the_work),
                                     cmocka_unit_test(samples_are_aligned_alike), cmocka_unit_test(samples_go_where_there_is_room)};
  open_backends(&cpu, &cuda); /* or skips */
  cuda->close(cuda);
  cpu->close(cpu);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
