// mma: one product by mma.sync, with its operands brought in by every form of ldmatrix and its result out by stmatrix.
//
//   y = a b + c
//
// Reference  none: building block test
// Launch     grid 1, block 32
// FLA        -
#pragma once
#include <fla/core/mma.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::test {

template <class T>
struct MmaParams {
    const T* a;      // [16, K], or [K, 16] when loaded with a transposition; K is 16, for f32 it is 8
    const T* b;      // [16, K], or [K, 16] when loaded with a transposition
    const float* c;  // [16, 16]
    float* y;        // [16, 16]
};

// In the order of the enums in the test.
enum class Load { X4, X2, X1, X4_TRANS, X2_TRANS, X1_TRANS };
enum class Store { REGISTERS, STMATRIX, STMATRIX_TRANS };

// Four 8x8 matrices, of which number i is at (i % 2, i / 2) of `s` [16, 16], or at (i / 2, i % 2).
template <Load LOAD, class T>
__device__ void load_matrices(u32 (&r)[4], const T (&s)[16][24], bool down) {
    const int lane = lane_id(), i = lane / 8;
    const auto row_of = [&](int i) { return &s[(down ? i % 2 : i / 2) * 8 + lane % 8][(down ? i / 2 : i % 2) * 8]; };
    if constexpr (LOAD == Load::X4) ldmatrix_x4(r, row_of(i));
    if constexpr (LOAD == Load::X4_TRANS) ldmatrix_x4_trans(r, row_of(i));
    if constexpr (LOAD == Load::X2 || LOAD == Load::X2_TRANS) {
        #pragma unroll
        for (int first = 0; first < 4; first += 2) {
            u32 pair[2];
            if constexpr (LOAD == Load::X2) ldmatrix_x2(pair, row_of(first + i % 2));
            if constexpr (LOAD == Load::X2_TRANS) ldmatrix_x2_trans(pair, row_of(first + i % 2));
            r[first] = pair[0];
            r[first + 1] = pair[1];
        }
    }
    if constexpr (LOAD == Load::X1 || LOAD == Load::X1_TRANS) {
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (LOAD == Load::X1) ldmatrix_x1(r[j], row_of(j));
            if constexpr (LOAD == Load::X1_TRANS) ldmatrix_x1_trans(r[j], row_of(j));
        }
    }
}

// The [16, 8] results d[0] and d[1], left and right, of 16-bit operands.
template <Load LOAD, class T>
__device__ void product(float (&d)[2][4], const MmaParams<T>& p) {
    constexpr bool TRANS = LOAD >= Load::X4_TRANS;
    __shared__ alignas(16) T s_a[16][24];  // [16, 16], and padding
    __shared__ alignas(16) T s_b[16][24];  // [16, 16], and padding
    for (int i = lane_id(); i < 256; i += 32) {
        s_a[i / 16][i % 16] = p.a[i];
        s_b[i / 16][i % 16] = p.b[i];
    }
    __syncwarp();  // s_a and s_b are complete

    // Left operand: matrices down the rows of a first. Right operand: along the inner dim first.
    u32 a[4], b[4];
    load_matrices<LOAD>(a, s_a, !TRANS);
    load_matrices<LOAD>(b, s_b, TRANS);
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        const u32 half[2] = {b[2 * j], b[2 * j + 1]};
        if constexpr (same<T, bf16>) {
            mma_m16n8k16_bf16(d[j], a, half, d[j]);
        } else {
            mma_m16n8k16_f16(d[j], a, half, d[j]);
        }
    }
}

// The same for tf32, whose operands come from global memory.
template <Load LOAD>
__device__ void product(float (&d)[2][4], const MmaParams<float>& p) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    u32 a[4];
    #pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = cvt_rna_tf32(p.a[(g + e % 2 * 8) * 8 + t + e / 2 * 4]);
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float* row = p.b + (8 * j + g) * 8 + t;
        const u32 b[2] = {cvt_rna_tf32(row[0]), cvt_rna_tf32(row[4])};
        mma_m16n8k8_tf32(d[j], a, b, d[j]);
    }
}

template <class Cfg>
__device__ void mma(const MmaParams<typename Cfg::T>& p) {
    using T = typename Cfg::T;
    constexpr Store STORE = Store(Cfg::STORE);
    const int lane = lane_id(), g = lane / 4, t = lane % 4;

    float d[2][4];
    #pragma unroll
    for (int j = 0; j < 2; ++j) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) d[j][e] = p.c[(g + e / 2 * 8) * 16 + 8 * j + 2 * t + e % 2];
    }
    product<Load(Cfg::LOAD)>(d, p);

    if constexpr (STORE == Store::REGISTERS) {
        #pragma unroll
        for (int j = 0; j < 2; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) p.y[(g + e / 2 * 8) * 16 + 8 * j + 2 * t + e % 2] = d[j][e];
        }
    } else {
        // Matrix i of the result is at (i % 2, i / 2); stored with a transposition, at (i / 2, i % 2) of s_y.
        __shared__ alignas(16) T s_y[16][24];  // [16, 16], and padding
        const int i = lane / 8;
        const u32 r[4] = {
            pack2<T>(d[0][0], d[0][1]), pack2<T>(d[0][2], d[0][3]), pack2<T>(d[1][0], d[1][1]),
            pack2<T>(d[1][2], d[1][3])
        };
        if constexpr (STORE == Store::STMATRIX) stmatrix_x4(&s_y[i % 2 * 8 + lane % 8][i / 2 * 8], r);
        if constexpr (STORE == Store::STMATRIX_TRANS) stmatrix_x4_trans(&s_y[i / 2 * 8 + lane % 8][i % 2 * 8], r);
        __syncwarp();  // s_y is complete
        for (int e = lane; e < 256; e += 32) p.y[e] = to_f32(s_y[e / 16][e % 16]);
    }
}

}  // namespace fla::test
