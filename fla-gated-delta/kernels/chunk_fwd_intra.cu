// chunk_fwd_intra: the products inside a chunk, and the inverse that makes its rows independent of each other.
//
//   G     = cumsum(g)        Gamma_ij = e^{G_i - G_j}                             (1)
//   T     = Gamma (I + stril(beta_i k_i . k_j))^{-1}                              (2)  elementwise product with Gamma
//   P_ij  = scale Gamma_ij q_i . k_j                      for i >= j              (3)
//
// A scalar gate is a diagonal similarity, so the inverse is that of the rule without decay.
//
// Reference  fla_reference::gated_delta::recurrent_fwd
// Launch     grid NT * H, block 2 * C: a block has one chunk of a query head and all its value heads
// FLA        chunk_gated_delta_rule_fwd_intra
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/scan.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/tri_inverse.cuh>
#include <fla/core/warp.cuh>
#include <fla/gated_delta/chunk.cuh>
#include <fla/gated_delta/chunk_rows.cuh>

namespace fla::gated_delta {

template <class Element, class Work>
struct ChunkFwdIntraParams {
    const Element* q;        // [B, T, H, K]
    const Element* k;        // [B, T, H, K]
    const float* g;          // [B, T, HV]       log decay, natural base, at most 0
    const Element* g_logit;  // [B, T, HV]       in its place: g = -e^a_log softplus(g_logit + dt_bias)
    const float* a_log;      // [HV]
    const float* dt_bias;    // [HV]             null: zero
    const Element* beta;     // [B, T, HV]
    const i64* chunks;       // [NT, 2]
    Work* inverse;           // [NT, HV, C, C]   T
    Work* scores;            // [NT, HV, C, C]   P
    float* factors;          // [NT, HV, 8, C]
    i32 h;
    i32 hv;
    float scale;
};

template <class Cfg>
concept ChunkFwdIntraConfig = ChunkTiles<Cfg> && requires {
    Cfg::LOG_GATE;      // g is a log decay
    Cfg::RAW_GATE;      // g is made of logits, a_log and dt_bias
    Cfg::HEAD_BETA;     // a strength for each head
    Cfg::SIGMOID_BETA;  // strengths are logits
    Cfg::TWICE_BETA;    // strengths are doubled after that
    Cfg::NORMALISE_QK;  // q and k are divided by their lengths
};

template <ChunkFwdIntraConfig Cfg>
struct ChunkFwdIntraShared {
    using Tile = OperandTile<typename Cfg::Half, Cfg::PARTS, Cfg::C, PADDED_K<Cfg>>;
    Tile k, q;                                 // [C, K]
    SharedTile<float, Cfg::C, Cfg::C> inverse;  // [C, C]
    Factors<Cfg::C> factors;
    float lengths[2][Cfg::C];  // squared, of keys and, where they are normalised, of queries
};

// r = rows row0 .. of `s` times all keys; what is above the diagonal is not formed.
template <class Half, int PARTS, int C, int COLS>
__device__ void times_keys(
    RegTile<16, C>& r,
    const OperandTile<Half, PARTS, C, COLS>& s,
    const OperandTile<Half, PARTS, C, COLS>& s_k,
    int row0
) {
    zero(r);
    #pragma unroll 2
    for (int k = 0; k < COLS; k += 16) {
        OperandA<Half, PARTS, 16, 16> a;
        load_a(a, s, row0, k);
        #pragma unroll
        for (int j = 0; j < C / 16; ++j) {
            if (16 * j > row0) break;
            OperandB<Half, PARTS, 16, 16> b;
            load_b_transposed(b, s_k, 16 * j, k);
            mma_block(r, j, a, 0, b);
        }
    }
}

template <ChunkFwdIntraConfig Cfg>
__device__ void chunk_fwd_intra(const ChunkFwdIntraParams<typename Cfg::Element, typename Cfg::Work>& p) {
    using Work = typename Cfg::Work;
    constexpr int C = Cfg::C, K = Cfg::K, THREADS = 2 * C, ELEMS = C * C;
    constexpr bool VECTORS = VECTORS_K<Cfg>;
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkFwdIntraShared<Cfg>*>(s_bytes);

    const i64 i_chunk = blockIdx.x / u32(p.h), i_h = blockIdx.x % u32(p.h);
    const Chunk chunk = reinterpret_cast<const Chunk*>(p.chunks)[i_chunk];
    const int i_warp = threadIdx.x / 32, row0 = 16 * i_warp;
    const i64 qk_row = (chunk.first * p.h + i_h) * K, stride = i64(p.h) * K;
    load_rows<THREADS, VECTORS>(s.k, p.k + qk_row, stride, int(chunk.rows), K, threadIdx.x);
    load_rows<THREADS, VECTORS>(s.q, p.q + qk_row, stride, int(chunk.rows), K, threadIdx.x);
    cp_async_commit_group();
    const int group = u32(p.hv) / u32(p.h);
    // Asked for while the tiles are on their way.
    RowNumbers<C / 32> numbers = {};
    if (i_warp == 0) numbers = load_numbers<Cfg>(p, chunk, i_h * group);
    cp_async_wait_group<0>();
    __syncthreads();  // q and k are there

    row_lengths<THREADS>(s.lengths[0], s.k);
    if constexpr (Cfg::NORMALISE_QK) row_lengths<THREADS>(s.lengths[1], s.q);
    for (int i = 0; i < group; ++i) {
        const i64 i_hv = i_h * group + i, tile = i_chunk * p.hv + i_hv;
        __syncthreads();  // lengths are there, and the last head's inverse and factors have been read
        if (i_warp == 0) row_factors<Cfg>(s.factors, s.lengths, numbers, p.scale);
        // Once more for each value head: registers do not hold the products while the inverse is made.
        RegTile<16, C> r;  // [16, C]
        times_keys(r, s.k, s.k, row0);
        __syncthreads();  // factors are there

        const auto& f = s.factors.at;
        // (2), whose inverse follows
        for_lower(r, i_warp, [&](int row, int col, float& x) {
            const float norms = Cfg::NORMALISE_QK ? f[K_NORM][row] * f[K_NORM][col] : 1.0f;
            x = row > col ? x * f[BETA][row] * norms : 0.0f;
        });
        store(s.inverse, r, row0, 0);
        __syncthreads();  // I + L is there
        if (i_warp < TRI_INVERSE_WARPS<C>) {
            tri_inverse < Cfg::PARTS == 1 ? Merge::TF32 : Merge::TF32X3 > (s.inverse, i_warp, 1);
        }
        if (i_warp == 0 && i + 1 < group) numbers = load_numbers<Cfg>(p, chunk, i_hv + 1);
        // (3)
        times_keys(r, s.q, s.k, row0);
        for_lower(r, i_warp, [&](int row, int col, float& x) {
            const float decay = exp2_approx(f[G2][row] - f[G2][col]);
            const float norms = Cfg::NORMALISE_QK ? f[Q_NORM][row] * f[K_NORM][col] : 1.0f;
            x = row >= col ? x * decay * (p.scale * norms) : 0.0f;
        });
        store_result<true>(p.scores + tile * ELEMS + i64(row0) * C, C, r, 16, C);
        for (int j = threadIdx.x; j < FACTORS * C; j += THREADS) {
            p.factors[tile * (FACTORS * C) + j] = (&f[0][0])[j];
        }
        __syncthreads();  // the inverse is there
        for (int j = threadIdx.x * 4; j < ELEMS; j += THREADS * 4) {
            const int row = j / C, col = j % C;
            const float4 x = reinterpret_cast<const float4&>(s.inverse.at(row, col));
            const float in[4] = {x.x, x.y, x.z, x.w};
            Vec<Work, 4> out;
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float decay = exp2_approx(f[G2][row] - f[G2][col + e]);
                out.at[e] = from_f32<Work>(row >= col + e ? in[e] * decay : 0.0f);
            }
            store(p.inverse + tile * ELEMS + j, out);
        }
    }
}

}  // namespace fla::gated_delta
