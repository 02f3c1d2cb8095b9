/* test_tree.c: sums over ranks, each a thread here, are those of the fixed tree, bit for bit, whatever the number of ranks and the length; and long
 * ones send no more than they have to, in parts that begin at multiples of 128 bytes. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "compare.h"
#include "tree.h"

enum { MOST_RANKS = 16, MOST_FLOATS = 100003, LINE = 32 };

/* A place for one message from each rank to each other. */
static struct mail {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  const float *from[MOST_RANKS][MOST_RANKS]; /* [sender][receiver]; NULL: taken */
  size_t count[MOST_RANKS][MOST_RANKS];
} mail = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

struct rank {
  int rank, size;
  size_t count, sent;
  float *values, *scratch;
  bool right_counts, at_lines;
  pthread_t thread;
};

/* Both ways at once: what is sent is put there, then the partner's is taken, then one waits until the own one is. */
static void exchange(void *context, const float *mine, size_t mine_count, float *theirs, size_t theirs_count, int partner) {
  struct rank *r = context;
  pthread_mutex_lock(&mail.lock);
  if (mine_count) {
    mail.from[r->rank][partner] = mine;
    mail.count[r->rank][partner] = mine_count;
    r->sent += mine_count;
    if ((mine - r->values) % LINE != 0) r->at_lines = false;
    pthread_cond_broadcast(&mail.changed);
  }
  if (theirs_count) {
    while (!mail.from[partner][r->rank]) pthread_cond_wait(&mail.changed, &mail.lock);
    if (mail.count[partner][r->rank] != theirs_count) r->right_counts = false;
    memcpy(theirs, mail.from[partner][r->rank], theirs_count * sizeof *theirs);
    mail.from[partner][r->rank] = NULL;
    pthread_cond_broadcast(&mail.changed);
  }
  while (mine_count && mail.from[r->rank][partner]) pthread_cond_wait(&mail.changed, &mail.lock);
  pthread_mutex_unlock(&mail.lock);
}

static void add(void *context, float *values, const float *other, size_t count) {
  (void)context;
  for (size_t i = 0; i < count; i++) values[i] += other[i];
}

static void *rank_main(void *argument) {
  struct rank *r = argument;
  struct tree_link link = {r, exchange, add};
  tree_sum(&link, r->rank, r->size, r->values, r->count, r->scratch);
  return NULL;
}

/* One element of the sum over ranks [begin, begin + size), a power of two. */
static float tree_of(float *const given[], int begin, int size, size_t i) {
  return size == 1 ? given[begin][i] : tree_of(given, begin, size / 2, i) + tree_of(given, begin + size / 2, size / 2, i);
}

static void check(int size, size_t count) {
  struct rank ranks[MOST_RANKS];
  float *given[MOST_RANKS];
  int power = 1;
  while (2 * power <= size) power *= 2;
  for (int r = 0; r < size; r++) {
    uint64_t state = 100 + (uint64_t)r;
    ranks[r] = (struct rank){.rank = r, .size = size, .count = count, .right_counts = true, .at_lines = true};
    ranks[r].values = malloc(count * sizeof(float));
    ranks[r].scratch = malloc(count * sizeof(float));
    given[r] = malloc(count * sizeof(float));
    assert_true(ranks[r].values && ranks[r].scratch && given[r]);
    for (size_t i = 0; i < count; i++) /* of sizes from 1e-6 to 1e6, so that the order of sums shows */
      given[r][i] = (float)((random_uniform(&state) - 0.5) * pow(10, (double)((i * 7 + (size_t)r * 5) % 13) - 6));
    memcpy(ranks[r].values, given[r], count * sizeof(float));
  }
  for (int r = 0; r < size; r++) assert_int_equal(pthread_create(&ranks[r].thread, NULL, rank_main, &ranks[r]), 0);
  for (int r = 0; r < size; r++) assert_int_equal(pthread_join(ranks[r].thread, NULL), 0);
  for (int r = power; r < size; r++)
    for (size_t i = 0; i < count; i++) given[r - power][i] += given[r][i];
  for (size_t i = 0; i < count; i++) {
    float sum = tree_of(given, 0, power, i);
    for (int r = 0; r < size; r++)
      if (memcmp(&ranks[r].values[i], &sum, sizeof sum) != 0)
        fail_msg("%d ranks, %zu floats: rank %d has %a at %zu, not %a", size, count, r, (double)ranks[r].values[i], i, (double)sum);
  }
  for (int r = 0; r < size; r++) {
    assert_true(ranks[r].right_counts && ranks[r].at_lines);
    if (size == power && count > 10000) assert_true(ranks[r].sent <= 2 * count - 2 * count / (size_t)size + 2 * LINE * MOST_RANKS);
    free(ranks[r].values);
    free(ranks[r].scratch);
    free(given[r]);
  }
}

static void test_sums_are_those_of_the_tree(void **state) {
  (void)state;
  static const int sizes[] = {1, 2, 3, 4, 5, 6, 8, 13, 16};
  static const size_t counts[] = {1, 2, 1000, 4095, 4096, 4097, 4111, MOST_FLOATS};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) check(sizes[s], counts[c]);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_sums_are_those_of_the_tree)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
