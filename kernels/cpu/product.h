// Dense products with a float32 result: PyTorch has none of bfloat16 operands on a CPU, and its float32 one leaves half of
// some processors' arithmetic unused.
//
//     out[i][j] = sum_k a[i][k] b[k][j], or that added
//
// Tiling: b is packed into panels (tile.h) of at most 1 MiB together. A tile's rows of a go by all of them, and are read
// once; they are read where they are, but where a word takes two columns that are not side by side, these are mixed first.
// A deep product is cut: 192 rows go by a panel of 256 words, which stays in the first cache, and then by the next. Tiles
// that are not whole take a way round, by rows of zeros and room of their own.
// Traffic: a once for each set of panels, b once, out once for each cut of the depth.
// Numerics: float32 sums, one after the other along the depth, of exact products.
#pragma once

#include "logitless_cpu.h"
#include "operands.h"

namespace {

constexpr std::int64_t DEEPEST = 2048;         // words that are summed at once; where there are more
constexpr std::int64_t DEEP = 256;             // it is so many, and
constexpr std::int64_t TALL = 192;             // so many rows meet a panel while it is in the first cache
constexpr std::int64_t PANEL_WORDS = 1 << 18;  // of all panels at once

// Where an element of a matrix is.
template <typename T>
struct Matrix {
    const T* data;
    std::int64_t row, column;
    const T* at(std::int64_t i, std::int64_t k) const { return data + i * row + k * column; }
};

struct Shape {
    std::int64_t rows, columns, depth;
};

// A part of a tile, from room of its own.
void add_part(const float* tile_sums, float* out, std::int64_t stride, std::int64_t rows, std::int64_t columns, bool adds) {
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j)
            out[i * stride + j] = tile_sums[i * GROUP + j] + (adds ? out[i * stride + j] : 0);
}

// A word of a matrix along its depth, from column k on, of which `left` are there.
std::int32_t word_of(Matrix<float> x, std::int64_t i, std::int64_t k, std::int64_t) {
    std::int32_t word;
    std::memcpy(&word, x.at(i, k), sizeof word);
    return word;
}
std::int32_t word_of(Matrix<bfloat16> x, std::int64_t i, std::int64_t k, std::int64_t left) {
    return pair_of(x.at(i, k)->bits, left > 1 ? x.at(i, k + 1)->bits : 0);
}

// Words of neighbouring rows, whose elements are side by side, for one step of the depth.
void words_across(Matrix<float> x, std::int64_t i, std::int64_t k, std::int64_t, std::int64_t count, std::int32_t* out) {
    std::memcpy(out, x.at(i, k), static_cast<std::size_t>(count) * sizeof *out);
}
void words_across(Matrix<bfloat16> x, std::int64_t i, std::int64_t k, std::int64_t left, std::int64_t count,
                  std::int32_t* out) {
    const bfloat16 *const low = x.at(i, k), *const high = left > 1 ? x.at(i, k + 1) : nullptr;
    for (std::int64_t j = 0; j < count; ++j) out[j] = pair_of(low[j].bits, high == nullptr ? 0 : high[j].bits);
}

// A product whose words hold EACH columns of the depth.
template <typename Kind, typename T, std::int64_t EACH>
class Dense {
  public:
    Dense(Matrix<T> left, Matrix<T> right, Shape wanted, float* to, std::int64_t row)
        : a(left), b{right.data, right.column, right.row}, shape(wanted), out(to), stride(row),
          words((wanted.depth + EACH - 1) / EACH), deep(words > DEEPEST ? DEEP : words),
          tall(words > DEEPEST ? TALL : Kind::ROWS),
          wide(smaller(round_up(wanted.columns, GROUP), PANEL_WORDS / deep / GROUP * GROUP)),
          across(EACH > 1 && a.column != 1 && a.row == 1), panels(deep * wide),
          mixed(across ? deep * (wanted.rows + Kind::ROWS) : 1), scratch(Kind::ROWS * deep) {}

    std::int32_t run(bool adds) {
        if (any_failed(panels, mixed, scratch)) return -2;
        for (std::int64_t j = 0; j < shape.columns; j += wide)
            for (std::int64_t k = 0; k < words; k += deep)
                multiply(j, smaller(wide, shape.columns - j), k, smaller(deep, words - k), adds || k > 0);
        return 0;
    }

  private:
    // Panels of columns [first, first + columns), words [from, from + depth).
    void pack_panels(std::int64_t first, std::int64_t columns, std::int64_t from, std::int64_t depth) {
        std::int32_t* to = panels.data;
        for (std::int64_t j = first; j < first + columns; j += GROUP) {
            const std::int64_t here = smaller(GROUP, first + columns - j);
            for (std::int64_t k = from; k < from + depth; ++k, to += GROUP) {
                if (here < GROUP) std::memset(to, 0, GROUP * sizeof *to);
                const std::int64_t left = shape.depth - k * EACH;
                if (b.row == 1)
                    words_across(b, j, k * EACH, left, here, to);
                else
                    for (std::int64_t i = 0; i < here; ++i) to[i] = word_of(b, j + i, k * EACH, left);
            }
        }
    }

    void multiply(std::int64_t first, std::int64_t columns, std::int64_t from, std::int64_t depth, bool adds) {
        pack_panels(first, columns, from, depth);
        for (std::int64_t k = 0; across && k < depth; ++k)
            words_across(a, 0, (from + k) * EACH, shape.depth - (from + k) * EACH, shape.rows,
                         mixed.data + k * (shape.rows + Kind::ROWS));
        for (std::int64_t top = 0; top < shape.rows; top += tall)
            for (std::int64_t j = 0; j < columns; j += GROUP)
                for (std::int64_t i = top; i < smaller(top + tall, shape.rows); i += Kind::ROWS)
                    multiply_tile(i, from, depth, panels.data + j * depth, smaller(GROUP, columns - j),
                                  out + i * stride + first + j, adds);
    }

    // Where the words of a tile's rows are: word k of row i at i row + k column.
    struct Source {
        const std::int32_t* words;
        std::int64_t row, column;
    };

    Source source(std::int64_t i, std::int64_t from, std::int64_t depth, std::int64_t here) {
        if (across) return {mixed.data + i, 1, shape.rows + Kind::ROWS};
        const bool pairs = a.row % EACH == 0 && (from + depth) * EACH <= shape.depth;
        if (here == Kind::ROWS && a.column == 1 && pairs) return {as_words(a.at(i, from * EACH)), a.row / EACH, 1};
        if (here == Kind::ROWS && a.row == 1 && EACH == 1) return {as_words(a.at(i, from)), 1, a.column};
        for (std::int64_t r = 0; r < Kind::ROWS; ++r)
            for (std::int64_t k = 0; k < depth; ++k) {
                const std::int64_t at = (from + k) * EACH;
                scratch[r * deep + k] = r < here ? word_of(a, i + r, at, shape.depth - at) : 0;
            }
        return {scratch.data, deep, 1};
    }

    static const std::int32_t* as_words(const T* x) { return reinterpret_cast<const std::int32_t*>(x); }

    // A tile, which may be a part of one.
    void multiply_tile(std::int64_t i, std::int64_t from, std::int64_t depth, const std::int32_t* panel,
                       std::int64_t columns, float* to, bool adds) {
        const std::int64_t here = smaller(Kind::ROWS, shape.rows - i);
        const Source rows = source(i, from, depth, here);
        if (here == Kind::ROWS && columns == GROUP) return go(rows, panel, depth, to, stride, adds);
        float sums[Kind::ROWS * GROUP];
        go(rows, panel, depth, sums, GROUP, false);
        add_part(sums, to, stride, here, columns, adds);
    }

    static void go(Source rows, const std::int32_t* panel, std::int64_t depth, float* to, std::int64_t step, bool adds) {
        const auto run = rows.column == 1 ? (adds ? tile<Kind, true, true> : tile<Kind, true, false>)
                                          : (adds ? tile<Kind, false, true> : tile<Kind, false, false>);
        run(rows.words, rows.row, rows.column, panel, depth, to, step);
    }

    const Matrix<T> a, b;  // b's rows are the product's columns
    const Shape shape;
    float* const out;
    const std::int64_t stride, words, deep, tall, wide;
    const bool across;  // whether a's rows are side by side, and its words are mixed from two columns
    Array<std::int32_t> panels, mixed, scratch;
};

// Rows of a, and columns of b, of contiguous bfloat16, by AMX's tiles.
template <typename Operand>
std::int32_t tiled_product(Matrix<bfloat16> a, Matrix<bfloat16> b, Shape shape, float* out, std::int64_t stride, bool adds) {
    const std::int64_t words = Operand::words(shape.depth), row = round_up(words, LINE) + LINE;
    const std::int64_t fit = PANEL_WORDS / words / GROUP * GROUP;
    const std::int64_t wide = smaller(round_up(shape.columns, GROUP), fit < GROUP ? GROUP : fit);
    Array<std::int32_t> panels(wide * words), staged(Operand::ROWS * row + 2 * LINE);
    if (any_failed(panels, staged)) return -2;
    float sums[Operand::ROWS * GROUP];
    Operand::start();
    for (std::int64_t first = 0; first < shape.columns; first += wide) {
        const std::int64_t columns = smaller(wide, shape.columns - first);
        pack<bfloat16, Operand>(b.at(0, first), b.column, columns, shape.depth, nullptr, staged.data, panels.data);
        for (std::int64_t i = 0; i < shape.rows; i += Operand::ROWS) {
            const std::int64_t here = smaller(Operand::ROWS, shape.rows - i);
            for (std::int64_t r = 0; r < here; ++r)
                Operand::stage(a.at(i + r, 0), shape.depth, 1, staged.data + r * row);
            for (std::int64_t j = 0; j < columns; j += GROUP) {
                float* const to = out + i * stride + first + j;
                const bool whole = here == Operand::ROWS && j + GROUP <= columns && !adds;
                Operand::multiply(staged.data, row, panels.data + j * words, words, whole ? to : sums, whole ? stride : GROUP);
                if (!whole) add_part(sums, to, stride, here, smaller(GROUP, columns - j), adds);
            }
        }
    }
    Operand::stop();
    return 0;
}

}  // namespace
