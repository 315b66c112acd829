// chunk_rows: the numbers that belong to the rows of a chunk: gates, strengths, lengths of keys and queries, and the factors
// that are made of them.
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/scan.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>
#include <fla/gated_delta/chunk.cuh>
#include <fla/gated_delta/recurrent_fwd.cuh>

namespace fla::gated_delta {

// A log decay, base 2, under which a factor is as good as 0; larger sums would lose what small ones have.
inline constexpr float LEAST_G2 = -0x1.4p+7f;  // -160

// Squared lengths of the rows of a tile. THREADS threads call it, the first of the block unless FIRST says otherwise.
template <int THREADS, bool FIRST = true, class Half, int PARTS, int C, int COLS>
__device__ void row_lengths(float (&s_lengths)[C], const OperandTile<Half, PARTS, C, COLS>& s) {
    constexpr int LANES = min(THREADS / C, 8);  // of a row
    const int row = (FIRST ? threadIdx.x : threadIdx.x % THREADS) / LANES, lane = threadIdx.x % LANES;
    float sum = 0.0f;
    if (row < C) {
        #pragma unroll
        for (int col = 0; col < COLS; col += 2 * LANES) {
            const float2 x = read_pair(s, row, col + 2 * lane);
            sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
        }
    }
    sum = group_sum<LANES>(sum);
    if (row < C && lane == 0) s_lengths[row] = sum;
}

// The numbers of a chunk's rows for a value head, a row or two for each lane of a warp.
template <int N>
struct RowNumbers {
    float g2[N], beta[N];
};

template <class Cfg, class Params>
__device__ RowNumbers<Cfg::C / 32> load_numbers(const Params& p, const Chunk& chunk, i64 i_hv) {
    RowNumbers<Cfg::C / 32> r;
    #pragma unroll
    for (int i = 0; i < Cfg::C / 32; ++i) {
        const int row = 32 * i + lane_id();
        const i64 at = (chunk.first + row) * p.hv + i_hv;
        float g = 0.0f;
        r.beta[i] = 0.0f;
        if (row < chunk.rows) {
            if (Cfg::LOG_GATE) g = p.g[at];
            if (Cfg::RAW_GATE) {
                const float bias = p.dt_bias == nullptr ? 0.0f : p.dt_bias[i_hv];
                g = -expf(p.a_log[i_hv]) * softplus(to_f32(p.g_logit[at]) + bias);
            }
            r.beta[i] = Cfg::HEAD_BETA ? map_beta<Cfg>(to_f32(p.beta[at])) : 1.0f;
        }
        r.g2[i] = fmaxf(g * LOG2_E, LEAST_G2);
    }
    return r;
}

// The factors of a chunk's rows. One warp calls it. Without GROWTH that one is left out, and lengths are not read unless keys
// and queries are normalised.
template <class Cfg, bool GROWS = true>
__device__ void row_factors(
    Factors<Cfg::C>& s, const float (&s_lengths)[2][Cfg::C], const RowNumbers<Cfg::C / 32>& r, float scale
) {
    constexpr int C = Cfg::C, N = C / 32;
    float g2[N];
    #pragma unroll
    for (int i = 0; i < N; ++i) g2[i] = r.g2[i];
    row_prefix_sum(g2);
    const float last = __shfl_sync(FULL_WARP, g2[N - 1], 31);
    #pragma unroll
    for (int i = 0; i < N; ++i) {
        const int row = 32 * i + lane_id();
        const float beta = r.beta[i], gamma = exp2_approx(g2[i]);
        const float k_norm = Cfg::NORMALISE_QK ? rsqrtf(s_lengths[0][row] + NORM_EPS) : 1.0f;
        const float q_norm = Cfg::NORMALISE_QK ? rsqrtf(s_lengths[1][row] + NORM_EPS) : 1.0f;
        s.at[G2][row] = g2[i];
        s.at[BETA][row] = beta;
        s.at[K_NORM][row] = k_norm;
        s.at[Q_NORM][row] = q_norm;
        s.at[FROM_STATE][row] = beta * gamma * k_norm;
        s.at[TO_OUTPUT][row] = scale * gamma * q_norm;
        s.at[TO_STATE][row] = k_norm * exp2_approx(last - g2[i]);
        if constexpr (GROWS) {
            // A step is e^g (I - beta k k^T), which stretches by 1, or by |1 - beta |k|^2| along the key.
            const float along = fabsf(1.0f - beta * s_lengths[0][row] * k_norm * k_norm);
            s.at[GROWTH][row] = r.g2[i] + log2_approx(fmaxf(along, 1.0f));
        }
    }
}

// Calls f(row, col, element) for what this lane holds of 16 rows of a lower triangle, blocks of 16 that have none left out.
template <int C, class F>
__device__ void for_lower(RegTile<16, C>& r, int i_block, F f) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        if (j / 2 > i_block) break;
        #pragma unroll
        for (int e = 0; e < 4; ++e) f(16 * i_block + g + e / 2 * 8, 8 * j + 2 * t + e % 2, r.at[0][j][e]);
    }
}

}  // namespace fla::gated_delta
