/* tile.h: products of tiles in shared memory on the tensor cores, by mma.sync m16n8k16 (bf16 operands, fp32 sums) and ldmatrix, as the PTX
 * manual lays out their registers. A warp owns 16 rows of a product; its lane l holds of each 16 x 8 accumulator the rows l / 4 and l / 4 + 8
 * at columns 2 (l % 4) and the next. Tests run the same code with both instructions emulated lane by lane. */
#ifndef OMNIQUANT_CUDA_TILE_H
#define OMNIQUANT_CUDA_TILE_H

#include "cuda/device.h"

/* Four 8 x 8 matrices of bf16 from shared memory; lanes 8i .. 8i + 7 give the addresses of the rows of matrix i. Each lane receives of every
 * matrix row l / 4 at columns 2 (l % 4) and the next; transposed: of column l / 4 at these rows. */
template <bool TRANSPOSED> DEVICE void load_matrices(uint32_t (&to)[4], const bf16 *row) {
#ifdef OMNIQUANT_EMULATED
  emulation::load_matrices(to, row, TRANSPOSED);
#else
  uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#endif
}

/* c[16, 8] += a[16, 16] b[16, 8] */
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef OMNIQUANT_EMULATED
  emulation::multiply_add(c, a, b0, b1);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

enum { TILE = 64, TILE_WARPS = TILE / 16, TILE_THREADS = TILE_WARPS * WARP };

/* A tile of 64 rows of D columns. Eight columns more a row let the eight rows of a matrix lie in different banks. */
template <int D> struct tile {
  enum { STRIDE = D + 8 };
  bf16 at[TILE * STRIDE];
};

/* Rows [row, row + TILE) of a matrix's D columns from `column` on into a tile; zero beyond `rows` and `width`. All threads of the block. */
template <int D>
DEVICE void tile_load(struct tile<D> &to, const bf16 *from, int64_t row, int64_t rows, int64_t stride, int64_t column, int width,
                      bool vectors) {
  for (int i = (int)threadIdx.x; i < TILE * D / 8; i += TILE_THREADS) {
    int r = i / (D / 8), c = i % (D / 8) * 8;
    const bf16 *in = from + (row + r) * stride + column + c;
    bf16 *out = to.at + r * tile<D>::STRIDE + c;
    bool there = row + r < rows;
    if (vectors && there && c < width)
      *(uint4 *)out = *(const uint4 *)in;
    else
      for (int n = 0; n < 8; n++) out[n] = there && c + n < width ? in[n] : bf16{0};
  }
}

/* sums[16, 64] += a's 16 rows from `row` on times the rows of b: a[16, D] b[64, D]^T. */
template <int D> DEVICE void multiply_by_rows(float (&sums)[TILE / 8][4], const struct tile<D> &a, int row, const struct tile<D> &b) {
  int lane = (int)threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t left[4], right[4];
    load_matrices<false>(left, a.at + (row + lane % 16) * tile<D>::STRIDE + k + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < TILE; n += 16) {
      load_matrices<false>(right, b.at + (n + lane / 16 * 8 + lane % 8) * tile<D>::STRIDE + k + lane / 8 % 2 * 8);
      multiply_add(sums[n / 8], left, right[0], right[1]);
      multiply_add(sums[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

/* sums[16, D] += a[16, 64] b[64, D], where a is an accumulator of the product above, rounded to bf16. */
template <int D> DEVICE void multiply_by_columns(float (&sums)[D / 8][4], const float (&a)[TILE / 8][4], const struct tile<D> &b) {
  int lane = (int)threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < TILE; k += 16) {
    const float(&low)[4] = a[k / 8], (&high)[4] = a[k / 8 + 1];
    uint32_t left[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3])},
             right[4];
#pragma unroll
    for (int n = 0; n < D; n += 16) {
      load_matrices<true>(right, b.at + (k + lane / 8 % 2 * 8 + lane % 8) * tile<D>::STRIDE + n + lane / 16 * 8);
      multiply_add(sums[n / 8], left, right[0], right[1]);
      multiply_add(sums[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

/* Row within the warp's 16 and column of an accumulator's element i of its n-th eight columns. */
DEVICE int tile_row(int i) {
  return (int)threadIdx.x % WARP / 4 + i / 2 * 8;
}
DEVICE int tile_column(int n, int i) {
  return n * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
}

/* Writes scale * sums to rows [row, row + 16) of a matrix; rows beyond `rows` and columns beyond `width` are left out. */
template <int D>
DEVICE void tile_store(bf16 *to, const float (&sums)[D / 8][4], const float (&scale)[2], int64_t row, int64_t rows, int64_t stride,
                       int64_t column, int width) {
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      int64_t r = row + tile_row(i);
      int c = tile_column(n, i);
      bf16 *out = to + r * stride + column + c;
      uint32_t pair = pack_bf16(sums[n][i] * scale[i / 2], sums[n][i + 1] * scale[i / 2]);
      if (r >= rows || c >= width) continue;
      if (c + 1 < width && (uintptr_t)out % 4 == 0) {
        *(uint32_t *)out = pair;
      } else {
        out[0] = {(uint16_t)pair};
        if (c + 1 < width) out[1] = {(uint16_t)(pair >> 16)};
      }
    }
}

#endif
