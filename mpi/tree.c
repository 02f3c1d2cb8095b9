/* tree.c: sums over ranks. Both partners of an exchange add the same two numbers, and floating-point addition is commutative, so that it does not
 * matter which of them does. */
#include "tree.h"

#include <stdbool.h>

enum {
  MOST_ROUNDS = 32,
  LINE = 32,   /* floats: halves begin at multiples, so that devices take them by vectors */
  SHORT = 4096 /* floats: below, the time of a message is its latency, and twice the rounds cost more than they save */
};

/* Recursive doubling: after the round of distance d each rank holds the sum of its aligned run of 2d ranks. */
static void sum_by_doubling(const struct tree_link *link, int rank, int size, float *values, size_t count, float *scratch) {
  for (int distance = 1; distance < size; distance *= 2) {
    link->exchange(link->context, values, count, scratch, count, rank ^ distance);
    link->add(link->context, values, scratch, count);
  }
}

/* Recursive halving: in each round partners exchange the halves of what they hold and each sums one; then the sums go back the same way. A rank
 * sends twice its values at most, however many ranks there are, and the least of them to the farthest partner. */
static void sum_by_halving(const struct tree_link *link, int rank, int size, float *values, size_t count, float *scratch) {
  size_t begin[MOST_ROUNDS + 1] = {0}, end[MOST_ROUNDS + 1] = {count}; /* of what a rank holds before each round */
  int round = 0;
  for (int distance = 1; distance < size; distance *= 2, round++) {
    size_t middle = begin[round] + (end[round] - begin[round]) / 2 / LINE * LINE;
    bool upper = (rank & distance) != 0;
    size_t kept = begin[round + 1] = upper ? middle : begin[round], given = upper ? begin[round] : middle;
    end[round + 1] = upper ? end[round] : middle;
    size_t kept_count = end[round + 1] - kept, given_count = end[round] - begin[round] - kept_count;
    link->exchange(link->context, values + given, given_count, scratch, kept_count, rank ^ distance);
    link->add(link->context, values + kept, scratch, kept_count);
  }
  for (int distance = size / 2; round-- > 0; distance /= 2) {
    size_t mine = begin[round + 1], mine_count = end[round + 1] - mine;
    size_t theirs = mine == begin[round] ? end[round + 1] : begin[round], theirs_count = end[round] - begin[round] - mine_count;
    link->exchange(link->context, values + mine, mine_count, values + theirs, theirs_count, rank ^ distance);
  }
}

/* Ranks beyond a power of two give theirs away first. */
void tree_sum(const struct tree_link *link, int rank, int size, float *values, size_t count, float *scratch) {
  int power = 1;
  while (power * 2 <= size) power *= 2;
  int extra = size - power;
  if (rank >= power) link->exchange(link->context, values, count, NULL, 0, rank - power);
  if (rank < extra) {
    link->exchange(link->context, NULL, 0, scratch, count, rank + power);
    link->add(link->context, values, scratch, count);
  }
  if (rank < power && count < SHORT) sum_by_doubling(link, rank, power, values, count, scratch);
  if (rank < power && count >= SHORT) sum_by_halving(link, rank, power, values, count, scratch);
  if (rank < extra) link->exchange(link->context, values, count, NULL, 0, rank + power);
  if (rank >= power) link->exchange(link->context, NULL, 0, values, count, rank - power);
}
