// shift: walks over runs of rows in time, in both directions of the gradient, with the neighbour kept in registers.
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/rwkv7/rows.cuh>

namespace fla::rwkv7 {

// Sequences on the token axis.
struct Sequences {
    const i64* cu_seqlens;  // [N + 1]  null: n dense sequences of t tokens
    i64 n;
    i64 t;

    __device__ i64 start(i64 i_n) const { return cu_seqlens != nullptr ? cu_seqlens[i_n] : i_n * t; }

    // The sequence that holds a row.
    __device__ i64 find(i64 row) const {
        if (cu_seqlens == nullptr) return row / t;
        i64 low = 0, high = n;  // start(low) <= row < start(high)
        while (high - low > 1) {
            const i64 middle = (low + high) / 2;
            (cu_seqlens[middle] <= row ? low : high) = middle;
        }
        return low;
    }
};

// The sequence of a row that only grows.
struct Cursor {
    i64 i_n;
    i64 bos;
    i64 eos;

    __device__ Cursor(const Sequences& seqs, i64 row)
        : i_n(seqs.find(row)), bos(seqs.start(i_n)), eos(seqs.start(i_n + 1)) {}

    __device__ void advance_to(const Sequences& seqs, i64 row) {
        while (row >= eos) {
            bos = eos;
            eos = seqs.start(++i_n + 1);
        }
    }
};

// Rows that one lane walks over in order: every lane has an equal part of a tile.
struct Run {
    i64 begin;
    i64 end;
};

// Calls `body(run)` for the runs of this thread's lane.
template <class Site, class Body>
__device__ void for_runs(const Rows& rows, const Site& site, Body body) {
    const i64 run_rows = rows.tile_rows / Site::LANES;
    const i64 step = site.groups * rows.tile_rows;
    for (i64 begin = site.i_group * rows.tile_rows + site.i_lane * run_rows; begin < rows.rows; begin += step) {
        body(Run{begin, min(begin + run_rows, rows.rows)});
    }
}

// Calls `body(first, x, previous)` for all rows of the run, in order and several at once; `previous` are the tokens
// before them in their sequences: the cache's, or zero, before the first.
template <int UNROLL, class Site, class Element, class Body>
__device__ void walk_shifted(
    const Site& site, const Sequences& seqs, const Run& run, const Element* x, const Element* cache, Body body
) {
    using Part = typename Site::Part;
    Cursor cursor(seqs, run.begin);
    Part last = {};
    if (cursor.bos < run.begin) last = site.load(x, run.begin - 1);
    unrolled_rows<UNROLL>(run.begin, run.end, 1, [&]<int N>(i64 first, i64) {
        Part r_x[N], r_previous[N];
        #pragma unroll
        for (int n = 0; n < N; ++n) r_x[n] = site.load(x, first + n);
        #pragma unroll
        for (int n = 0; n < N; ++n) {
            cursor.advance_to(seqs, first + n);
            r_previous[n] = last;
            if (first + n == cursor.bos) {
                r_previous[n] = {};
                if (cache != nullptr) r_previous[n] = site.load(cache, cursor.i_n);
            }
            last = r_x[n];
        }
        body(first, r_x, r_previous);
    });
}

// The last token of each sequence; an empty one hands its cache through.
template <class Site, class Element>
__device__ void store_last(
    const Site& site, const Sequences& seqs, const Element* x, const Element* cache, Element* cache_out
) {
    if (cache_out == nullptr) return;
    for (i64 i_n = site.i_group * Site::LANES + site.i_lane; i_n < seqs.n; i_n += site.groups * Site::LANES) {
        const i64 bos = seqs.start(i_n), eos = seqs.start(i_n + 1);
        typename Site::Part last = {};
        if (bos < eos) {
            last = site.load(x, eos - 1);
        } else if (cache != nullptr) {
            last = site.load(cache, i_n);
        }
        site.store(cache_out, i_n, last);
    }
}

// The gradient of the shift. For every row of a run, in order, `direct` is what reaches x_t beside the difference, and
// `d_delta` what reaches x_{t-1} - x_t:
//
//   dx_t = direct_t - d_delta_t + d_delta_{t+1}        d_cache = d_delta of the first token
//
// where the last token has the gradient of the cache in place of d_delta_{t+1}.
template <class Site, class Element>
struct ShiftGradient {
    static constexpr int SIZE = Site::SIZE;

    const Site& site;
    const Run& run;
    const Element* d_cache_out;  // [N, H, K]  null: zero
    Element* dx;
    Element* d_cache;            // [N, H, K]  null: not wanted
    float pending[SIZE] = {};    // dx of the row before, without its last term

    // `cursor` is at the sequence of `row`.
    __device__ void add(const Cursor& cursor, i64 row, const float (&direct)[SIZE], const float (&d_delta)[SIZE]) {
        if (row == cursor.bos) {
            if (d_cache != nullptr) site.store(d_cache, cursor.i_n, d_delta);
        } else if (row != run.begin) {
            complete(row - 1, d_delta);
        }
        #pragma unroll
        for (int e = 0; e < SIZE; ++e) pending[e] = direct[e] - d_delta[e];
        if (row + 1 == cursor.eos) {
            float d_last[SIZE] = {};
            if (d_cache_out != nullptr) {
                const auto d_cache_row = site.load(d_cache_out, cursor.i_n);
                #pragma unroll
                for (int e = 0; e < SIZE; ++e) d_last[e] = d_cache_row[e];
            }
            complete(row, d_last);
        }
    }

    // Stores dx of a row, which lacked `term`.
    __device__ void complete(i64 row, const float (&term)[SIZE]) const {
        float y[SIZE];
        #pragma unroll
        for (int e = 0; e < SIZE; ++e) y[e] = pending[e] + term[e];
        site.store(dx, row, y);
    }
};

// An empty sequence hands the gradient of its cache through.
template <class Site, class Element>
__device__ void store_empty(
    const Site& site, const Sequences& seqs, const Element* d_cache_out, Element* d_cache
) {
    if (d_cache == nullptr) return;
    for (i64 i_n = site.i_group * Site::LANES + site.i_lane; i_n < seqs.n; i_n += site.groups * Site::LANES) {
        if (seqs.start(i_n) < seqs.start(i_n + 1)) continue;
        typename Site::Part d_last = {};
        if (d_cache_out != nullptr) d_last = site.load(d_cache_out, i_n);
        site.store(d_cache, i_n, d_last);
    }
}

}  // namespace fla::rwkv7
