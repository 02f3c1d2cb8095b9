/* test_shard.c: dealing of samples to ranks, for counts that neither batch nor ranks divide: every sample has one owner and is summed in
 * its step once. For 1, 2, 4 and 8 ranks, simulated in one process, the sum over a step is the same bit for bit. */
#include "compare.h"
#include "shard.h"

enum { MOST_RANKS = 8, VALUES = 19 };

static const int sample_counts[] = {1, 2, 3, 5, 7, 8, 13, 16, 31, 128};
static const int batches[] = {1, 2, 3, 4, 5, 6, 8, 11, 16, 32};
enum { CASES = 100 };

/* ---- dealing ---- */

static void check_dealing(int samples, int batch, int size) {
  int owned = 0;
  bool seen[128] = {false};
  for (int rank = 0; rank < size; rank++) {
    struct shard shard;
    int before = -1;
    shard_init(&shard, samples, batch, rank, size);
    assert_int_equal(shard.steps, (samples + batch - 1) / batch);
    owned += shard.count;
    for (int local = 0; local < shard.count; local++) {
      int sample = shard_sample(&shard, local);
      assert_in_range(sample, 0, samples - 1);
      assert_true(sample > before);
      assert_false(seen[sample]);
      assert_int_equal(shard_owner(&shard, sample), rank);
      assert_in_range(sample % batch, shard.slot_begin, shard.slot_end - 1);
      seen[sample] = true;
      before = sample;
    }
    if (samples % batch == 0 && batch % size == 0) assert_int_equal(shard.count, samples / size);
  }
  assert_int_equal(owned, samples);
}

static void every_sample_has_one_owner(void **context) {
  (void)context;
  for (int i = 0; i < CASES; i++)
    for (int size = 1; size <= 9; size++) check_dealing(sample_counts[i / 10], batches[i % 10], size);
}

static void steps_hold_all_samples(void **context) {
  (void)context;
  for (int i = 0; i < CASES; i++) {
    struct shard shard;
    int total = 0;
    shard_init(&shard, sample_counts[i / 10], batches[i % 10], 0, 1);
    for (int step = 0; step < shard.steps; step++) {
      int present = shard_step_samples(&shard, step);
      assert_in_range(present, 1, shard.batch);
      assert_true(present == shard.batch || step == shard.steps - 1);
      total += present;
    }
    assert_int_equal(total, shard.samples);
  }
}

/* ---- sums ---- */

struct leaves {
  const struct shard *shard;
  int calls[128]; /* of each sample */
  int early;      /* values that a rank's last sample begins with; 0: it is made at once */
};

/* A sample's values, of sizes so different that the order of additions shows in the sum. */
static float leaf_value(int sample, int i) {
  uint64_t state = (uint64_t)(sample * VALUES + i);
  return (float)(random_normal(&state) * pow(10, (int)(random_bits(&state) % 8) - 4));
}

static void leaf(void *context, int local, float *out) {
  struct leaves *leaves = context;
  int sample = shard_sample(leaves->shard, local);
  assert_in_range(local, 0, leaves->shard->count - 1);
  leaves->calls[sample]++;
  for (int i = 0; i < VALUES; i++) out[i] = leaf_value(sample, i);
}

/* The same in two parts, with nonsense where the other part is to come. */
static void begin_leaf(void *context, int local, float *out) {
  const struct leaves *leaves = context;
  leaf(context, local, out);
  for (int i = leaves->early; i < VALUES; i++) out[i] = NAN;
}

static void finish_leaf(void *context, int local, float *out) {
  const struct leaves *leaves = context;
  for (int i = leaves->early; i < VALUES; i++) out[i] = leaf_value(shard_sample(leaves->shard, local), i);
}

/* A lane of a device that does all at once. */
static void no_order(struct kernels *k, struct lane *lane) {
  (void)k;
  (void)lane;
}

/* What world_allreduce does on all ranks: in the round of distance d partners rank and rank ^ d add what the other holds. */
static void combine(float values[MOST_RANKS][VALUES], int size) {
  float before[MOST_RANKS][VALUES];
  int power = 1;
  while (power * 2 <= size) power *= 2;
  for (int rank = power; rank < size; rank++)
    for (int i = 0; i < VALUES; i++) values[rank - power][i] += values[rank][i];
  for (int distance = 1; distance < power; distance *= 2) {
    memcpy(before, values, sizeof before);
    for (int rank = 0; rank < power; rank++)
      for (int i = 0; i < VALUES; i++) values[rank][i] += before[rank ^ distance][i];
  }
  for (int rank = power; rank < size; rank++) memcpy(values[rank], values[rank - power], sizeof *values);
}

/* sum[rank]: a step's sum as each of `size` ranks has it. */
static void sum_of_step(struct memory *d, int samples, int batch, int size, int step, float sum[MOST_RANKS][VALUES],
                        struct leaves *leaves) {
  struct world alone = {.size = 1}; /* leaves every rank's part as it is, for combine */
  for (int rank = 0; rank < size; rank++) {
    struct shard shard;
    shard_init(&shard, samples, batch, rank, size);
    float *out = poisoned_floats(d, VALUES), *scratch = poisoned_floats(d, (int64_t)shard_scratch(&shard, VALUES));
    struct step_sum what = {leaf, leaves, d->k, &alone, out, scratch, .count = VALUES};
    leaves->shard = &shard;
    if (leaves->early) what.begin = begin_leaf, what.rest = finish_leaf, what.early = leaves->early;
    shard_step_sum(&shard, step, &what);
    d->k->download(d->k, sum[rank], out, sizeof *sum);
    memory_free(d);
  }
  combine(sum, size);
}

/* The sum in double, and the sum of magnitudes that its rounding is measured by. */
static void plain_sum(int samples, int batch, int step, double sum[VALUES], double size[VALUES]) {
  for (int i = 0; i < VALUES; i++) sum[i] = size[i] = 0;
  for (int sample = step * batch; sample < (step + 1) * batch && sample < samples; sample++)
    for (int i = 0; i < VALUES; i++) {
      sum[i] += leaf_value(sample, i);
      size[i] += fabsf(leaf_value(sample, i));
    }
}

static void check_sums(struct memory *d, struct bound *bound, int samples, int batch, int size) {
  struct shard shard;
  struct leaves leaves = {0}, ignored = {0}, beside = {.early = VALUES / 3};
  char where[80];
  snprintf(where, sizeof where, "%d samples, batch %d, %d ranks", samples, batch, size);
  shard_init(&shard, samples, batch, 0, size);
  for (int step = 0; step < shard.steps; step++) {
    float one[MOST_RANKS][VALUES], sum[MOST_RANKS][VALUES], parts[MOST_RANKS][VALUES];
    double want[VALUES], magnitude[VALUES];
    sum_of_step(d, samples, batch, 1, step, one, &ignored);
    sum_of_step(d, samples, batch, size, step, sum, &leaves);
    sum_of_step(d, samples, batch, size, step, parts, &beside);
    plain_sum(samples, batch, step, want, magnitude);
    for (int rank = 0; rank < size; rank++) {
      for (int i = 0; i < VALUES; i++) bound_check(bound, fabs(sum[rank][i] - want[i]) / magnitude[i], where);
      if ((size & (size - 1)) == 0) assert_memory_equal(sum[rank], one[0], sizeof *sum);
      assert_memory_equal(sum[rank], sum[0], sizeof *sum);
      assert_memory_equal(parts[rank], sum[rank], sizeof *sum);
    }
  }
  for (int sample = 0; sample < samples; sample++) assert_int_equal(leaves.calls[sample], 1);
}

static void sums_are_the_same_for_any_power_of_two(void **context) {
  (void)context;
  struct bound bound = {"sum over a step, of the sum of magnitudes", 1e-6, 0};
  struct error error = {0};
  struct memory d = {.k = kernels_open("cpu", 1, 0, &error)};
  assert_non_null(d.k);
  d.k->follow = d.k->use = d.k->join = no_order;
  for (int i = 0; i < CASES; i++)
    for (int size = 1; size <= MOST_RANKS; size++) check_sums(&d, &bound, sample_counts[i / 10], batches[i % 10], size);
  d.k->close(d.k);
  bound_print(&bound, 1);
}

/* The test above would prove nothing if the order of additions did not matter. */
static void values_depend_on_the_order_of_additions(void **context) {
  (void)context;
  int differ = 0;
  for (int i = 0; i < VALUES; i++) {
    float forward = 0, backward = 0;
    for (int sample = 0; sample < 16; sample++) forward += leaf_value(sample, i);
    for (int sample = 15; sample >= 0; sample--) backward += leaf_value(sample, i);
    differ += forward != backward;
  }
  assert_true(differ > VALUES / 4);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_sample_has_one_owner),
      cmocka_unit_test(steps_hold_all_samples),
      cmocka_unit_test(sums_are_the_same_for_any_power_of_two),
      cmocka_unit_test(values_depend_on_the_order_of_additions),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
