// mma: matrix products of one warp, and the loads and stores that bring 8x8 matrices into its registers and back.
//
// Lane 4 g + t holds, of an [16, 8] result, rows g and g + 8 at columns 2 t and 2 t + 1: d[0], d[1] and d[2], d[3].
// The products are not volatile, so that loads may move across them.
#pragma once
#include <fla/core/prelude.cuh>

namespace fla {

// One 8x8 matrix of 16-bit elements: lane l of the first 8 names the 16 bytes of row l; lane 4 g + t gets elements
// 2 t and 2 t + 1 of row g, or with `_trans` of column g.
__device__ inline void ldmatrix_x1(u32& r, const void* s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r)
                 : "r"(shared_addr(s_row))
                 : "memory");
}

__device__ inline void ldmatrix_x1_trans(u32& r, const void* s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r)
                 : "r"(shared_addr(s_row))
                 : "memory");
}

// Two matrices; lanes 8 to 15 name the rows of the second.
__device__ inline void ldmatrix_x2(u32 (&r)[2], const void* s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_addr(s_row))
                 : "memory");
}

__device__ inline void ldmatrix_x2_trans(u32 (&r)[2], const void* s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_addr(s_row))
                 : "memory");
}

// Four matrices; lanes 8 i to 8 i + 7 name the rows of matrix i.
__device__ inline void ldmatrix_x4(u32 (&r)[4], const void* s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_addr(s_row))
                 : "memory");
}

__device__ inline void ldmatrix_x4_trans(u32 (&r)[4], const void* s_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_addr(s_row))
                 : "memory");
}

// Stores four matrices; the reverse of the loads, on sm_90 and later.
__device__ inline void stmatrix_x4(void* s_row, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(shared_addr(s_row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ inline void stmatrix_x4_trans(void* s_row, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(shared_addr(s_row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// The transpose of one 8x8 matrix of 16-bit elements that a warp holds: lane 4 g + t has elements 2 t and 2 t + 1 of row g.
__device__ inline u32 movmatrix_trans(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// d = a b + c with a [16, 16], b [16, 8], c and d [16, 8]; products are exact and sums are f32.
//
// Lane 4 g + t holds a at (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), and b at (2 t, g), (2 t + 8, g):
// pairs along the inner dim, the lower index in the lower half.
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ inline void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d = a b + c with a [16, 8], b [8, 8]. Lane 4 g + t holds a at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), and b
// at (t, g), (t + 4, g); each is an f32 of which the upper 19 bits count, so round with `cvt_rna_tf32` first.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Rounds to the 11 significant bits of tf32, ties away from zero. The result is an f32 too.
__device__ inline u32 cvt_rna_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

}  // namespace fla
