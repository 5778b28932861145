// The arithmetic in fp32, for inputs of any type; block_products.h says what an arithmetic is.
#pragma once

#include "attention/cpu/dots.h"

namespace pypar::PYPAR_ISA {

struct Fp32Arithmetic {
  int64_t H, Hv, padded_h, padded_hv;

  explicit Fp32Arithmetic(const AttentionProblem& p)
      : H(p.H), Hv(p.Hv), padded_h(round_up(p.H, kWidth)), padded_hv(round_up(p.Hv, kWidth)) {}

  static float* floats(void* bytes) { return static_cast<float*>(bytes); }
  static const float* floats(const void* bytes) { return static_cast<const float*>(bytes); }

  // ---- forward: q transposed, [H][kBlock]; k, v and out [][padded H or Hv]

  int64_t queries_bytes() const { return kBlock * padded_h * 4; }
  int64_t keys_bytes() const { return kBlock * padded_h * 4; }
  int64_t values_bytes() const { return kBlock * padded_hv * 4; }
  int64_t out_bytes() const { return kBlock * padded_hv * 4; }
  int64_t scratch_bytes() const { return kBlock * larger(padded_h, padded_hv) * 4; }

  void pack_queries(const Rows& q, int64_t first, int64_t count, float sign, void* queries,
                    void* scratch) const {
    pack(q, first, count, H, sign, floats(scratch), padded_h);
    transpose(floats(scratch), padded_h, count, padded_h, floats(queries), kBlock);
  }

  void pack_keys(const Rows& k, int64_t first, int64_t count, void* keys, void*) const {
    pack(k, first, count, H, 1.0f, floats(keys), padded_h);
  }

  void pack_values(const Rows& v, int64_t first, int64_t count, void* values, void*) const {
    pack(v, first, count, Hv, 1.0f, floats(values), padded_hv);
  }

  bool cleanse_values(void* values, int64_t num_keys) const {
    return cleanse(floats(values), num_keys * padded_hv);
  }

  void scores(const void* queries, int64_t count, const void* keys, int64_t num_keys, const Range* seen,
              float* result) const {
    multiply<false, false>(num_keys, (count + kWidth - 1) / kWidth, H, floats(keys), padded_h,
                           floats(queries), kBlock, result, kBlock, seen, nullptr, kChunk);
  }

  void clear_out(void* out) const { clear(floats(out), kBlock * padded_hv); }

  void add_out(const float* p, int64_t count, const void* values, int64_t num_keys, const Range* seen,
               const float* rescale, void* out, void*) const {
    if (rescale) {
      for (int64_t row = 0; row < count; ++row) {
        if (rescale[row] == 1.0f) continue;
        float* sums = floats(out) + row * padded_hv;
        for (int64_t i = 0; i < padded_hv; i += kWidth) store(sums + i, load(sums + i) * rescale[row]);
      }
    }
    multiply<true, true>(count, padded_hv / kWidth, num_keys, p, kBlock, floats(values), padded_hv,
                         floats(out), padded_hv, nullptr, seen);
  }

  // The rows and how far they are apart: in `result`, or where they are already.
  const float* read_out(const void* out, int64_t, float*, int64_t* stride) const {
    *stride = padded_hv;
    return floats(out);
  }

  // ---- backward: of the keys k, k transposed and v transposed; of the rows q and dout

  int64_t key_operands_bytes() const { return kBlock * (2 * padded_h + padded_hv) * 4; }
  int64_t row_operands_bytes() const { return kBlock * (padded_h + padded_hv) * 4; }
  // Sums, then totals.
  int64_t dk_bytes() const { return 2 * kBlock * padded_h * 4; }
  int64_t dv_bytes() const { return 2 * kBlock * padded_hv * 4; }

  void pack_key_operands(const Rows& k, const Rows& v, int64_t first, int64_t count, void* operands,
                         void* scratch) const {
    float* const plain = floats(operands);
    float* const transposed = plain + kBlock * padded_h;
    pack(k, first, count, H, 1.0f, plain, padded_h);
    transpose(plain, padded_h, count, padded_h, transposed, kBlock);
    pack(v, first, count, Hv, 1.0f, floats(scratch), padded_hv);
    transpose(floats(scratch), padded_hv, count, padded_hv, transposed + kBlock * padded_h, kBlock);
  }

  void pack_row_operands(const Rows& q, const Rows& dout, int64_t first, int64_t count, float sign,
                         void* operands, void*) const {
    pack(q, first, count, H, sign, floats(operands), padded_h);
    pack(dout, first, count, Hv, 1.0f, floats(operands) + kBlock * padded_h, padded_hv);
  }

  void products(const void* row_operands, int64_t count, const void* key_operands, int64_t num_keys,
                const Range* seen, float* s, float* dp) const {
    const int64_t vecs = (num_keys + kWidth - 1) / kWidth;
    const float* q = floats(row_operands);
    const float* k_transposed = floats(key_operands) + kBlock * padded_h;
    multiply<false, false>(count, vecs, H, q, padded_h, k_transposed, kBlock, s, kBlock, seen, nullptr,
                           kChunk);
    multiply<false, false>(count, vecs, Hv, q + kBlock * padded_h, padded_hv,
                           k_transposed + kBlock * padded_h, kBlock, dp, kBlock, seen, nullptr, kChunk);
  }

  void decoded_scores(const void* row_operands, int64_t count, const void* key_operands, int64_t num_keys,
                      float* s) const {
    for (int64_t row = 0; row < count; row += kDecodeTile) {
      decode_products<float, kDecodeTile>(floats(row_operands) + row * padded_h, padded_h,
                                          floats(key_operands), padded_h, num_keys, padded_h,
                                          s + row * kBlock, kBlock);
    }
  }

  // k itself is the operand of dq, q and dout those of dk and dv.
  bool cleanse_operands(void* row_operands, int64_t count, void* key_operands, int64_t num_keys) const {
    const bool in_k = cleanse(floats(key_operands), num_keys * padded_h);
    const bool in_q = cleanse(floats(row_operands), count * padded_h);
    return cleanse(floats(row_operands) + kBlock * padded_h, count * padded_hv) || in_q || in_k;
  }

  void clear_sums(void* dk, void* dv) const {
    clear(floats(dk), kBlock * padded_h);
    clear(floats(dv), kBlock * padded_hv);
  }

  void set_aside(void* dk, void* dv, bool first) const {
    set_aside(floats(dk), kBlock * padded_h, first);
    set_aside(floats(dv), kBlock * padded_hv, first);
  }

  void add_totals(void* dk, void* dv) const {
    add_totals(floats(dk), kBlock * padded_h);
    add_totals(floats(dv), kBlock * padded_hv);
  }

  void add_dk_dv(const float* p, const float* ds, const void* row_operands, int64_t count, int64_t num_keys,
                 const Range* seen, void* dk, void* dv, void*) const {
    const float* q = floats(row_operands);
    multiply<true, true>(num_keys, padded_hv / kWidth, count, p, kBlock, q + kBlock * padded_h, padded_hv,
                         floats(dv), padded_hv, nullptr, seen);
    multiply<true, true>(num_keys, padded_h / kWidth, count, ds, kBlock, q, padded_h, floats(dk), padded_h,
                         nullptr, seen);
  }

  void add_dq(const float* ds, int64_t count, const void* key_operands, int64_t num_keys, const Range* seen,
              bool first, float* sum, void*) const {
    const float* k = floats(key_operands);
    const int64_t vecs = padded_h / kWidth;
    if (first) {
      multiply<false, false>(count, vecs, num_keys, ds, kBlock, k, padded_h, sum, padded_h, nullptr, seen);
    } else {
      multiply<false, true>(count, vecs, num_keys, ds, kBlock, k, padded_h, sum, padded_h, nullptr, seen);
    }
  }

  const float* read_dq(const float* sum, int64_t, float*, int64_t* stride) const {
    *stride = padded_h;
    return sum;
  }
  const float* read_dk(const void* dk, int64_t, float*, int64_t* stride) const {
    *stride = padded_h;
    return floats(dk);
  }
  const float* read_dv(const void* dv, int64_t, float*, int64_t* stride) const {
    *stride = padded_hv;
    return floats(dv);
  }

  static void set_aside(float* sums, int64_t count, bool first) {
    for (int64_t i = 0; i < count; i += kWidth) {
      const Float x = load(sums + i);
      store(sums + count + i, first ? x : load(sums + count + i) + x);
      store(sums + i, zero());
    }
  }

  static void add_totals(float* sums, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store(sums + i, load(sums + count + i) + load(sums + i));
  }

  static void clear(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) store(x + i, zero());
  }
};

}  // namespace pypar::PYPAR_ISA
