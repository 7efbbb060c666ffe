// The kernels in offload._native: addresses as ints, every call without the GIL.
#include <cstring>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_update.h"
#include "kernels.h"
#include "update_job.h"
#include "update_pipeline.h"

namespace offload {
namespace {

constexpr int32_t kFlagMaximize = 1;
constexpr int32_t kFlagNesterov = 2;
constexpr int32_t kFlagDirect = 4;

// One op as Python packs it: '<qqiiddddddQq'.
struct OpRecord {
  int64_t begin;
  int64_t end;
  int32_t rule;
  int32_t flags;
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;
  uint64_t seed;
  int64_t step;
};
static_assert(sizeof(OpRecord) == 88, "the record has no padding");

// Behind the record of a factored op: '<QQ', then the factors of rows and of columns in fp32.
struct FactorRecord {
  uint64_t num_rows;
  uint64_t num_cols;
};

// What is left of the ops' bytes.
struct Bytes {
  const char* at;
  size_t nbytes;

  bool take(void* target, size_t count) {
    if (!check(count <= nbytes, "ops end in the middle of a record")) {
      return false;
    }
    std::memcpy(target, at, count);
    at += count;
    nbytes -= count;
    return true;
  }
};

bool parse_factors(Bytes* bytes, UpdateOp* op) {
  FactorRecord record;
  const uint64_t numel = op->end - op->begin;
  if (!bytes->take(&record, sizeof(record)) ||
      !check(record.num_rows > 0 && record.num_cols > 0 && record.num_rows <= numel &&
                 record.num_cols <= numel / record.num_rows &&
                 numel % (record.num_rows * record.num_cols) == 0,
             "an op's range must be whole matrices of num_rows x num_cols")) {
    return false;
  }
  const uint64_t num_factors = numel / record.num_cols + numel / record.num_rows;
  if (!check(num_factors <= bytes->nbytes / sizeof(float), "ops end in the middle of factors")) {
    return false;
  }
  op->factors.resize(num_factors);
  op->rule.factored.shape = {record.num_rows, record.num_cols};
  op->rule.factored.begin = op->begin;
  op->rule.factored.numel = numel;
  return bytes->take(op->factors.data(), num_factors * sizeof(float));
}

bool parse_op(Bytes* bytes, UpdateOp* op) {
  OpRecord record;
  if (!bytes->take(&record, sizeof(record))) {
    return false;
  }
  if (!check(record.begin >= 0 && record.end >= 0, "an op's range must not be negative") ||
      !check(record.rule >= 0 && record.rule < kNumRules,
             "an op's rule must be 0 (adamw), 1 (sgd), 2 (lion), 3 (factored) or 4 (scaled)") ||
      !check((record.flags & ~(kFlagMaximize | kFlagNesterov | kFlagDirect)) == 0,
             "an op has unknown flags") ||
      !check(record.step >= 1, "an op's step must be 1 or more")) {
    return false;
  }
  op->begin = static_cast<uint64_t>(record.begin);
  op->end = static_cast<uint64_t>(record.end);
  op->rule = make_rule({static_cast<RuleKind>(record.rule), record.lr, record.beta1, record.beta2,
                        record.eps, record.weight_decay, record.grad_scale, record.seed,
                        record.step, (record.flags & kFlagMaximize) != 0,
                        (record.flags & kFlagNesterov) != 0, (record.flags & kFlagDirect) != 0});
  return !has_factors(op->rule.kind) ||
         (check(record.begin < record.end, "an op's range is empty") && parse_factors(bytes, op));
}

}  // namespace

bool parse_ops(PyObject* object, std::vector<UpdateOp>* ops) {
  char* bytes = nullptr;
  Py_ssize_t nbytes = 0;
  if (PyBytes_AsStringAndSize(object, &bytes, &nbytes) < 0) {
    return false;
  }
  Bytes left = {bytes, static_cast<size_t>(nbytes)};
  while (left.nbytes > 0) {
    ops->emplace_back();
    if (!parse_op(&left, &ops->back())) {
      return false;
    }
  }
  return true;
}

const KernelSet* parse_isa(const char* isa) {
  const KernelSet* kernels = find_kernels(isa);
  if (!kernels) {
    PyErr_Format(PyExc_ValueError, "isa '%s' is unknown or not on this CPU; see supported_isas()",
                 isa);
  }
  return kernels;
}

bool parse_format(int value, StateFormat* format) {
  *format = static_cast<StateFormat>(value);
  return check(value >= 0 && value < kNumFormats,
               "format must be 0 (fp32), 1 (exact), 2 (bf16) or 3 (int8)");
}

namespace {

bool check_residue_nbytes(int residue_nbytes) {
  return check(residue_nbytes == 1 || residue_nbytes == 2, "residue_nbytes must be 1 or 2");
}

PyObject* kernel_split_fp32(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"src", "weight", "residue", "numel", "residue_nbytes",
                                "isa", nullptr};
  uint64_t src = 0, weight = 0, residue = 0, numel = 0;
  int residue_nbytes = 0;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&i|s:split_fp32",
                                   const_cast<char**>(names), convert_u64, &src, convert_u64,
                                   &weight, convert_u64, &residue, convert_u64, &numel,
                                   &residue_nbytes, &isa)) {
    return nullptr;
  }
  const KernelSet* kernels = parse_isa(isa);
  if (!kernels || !check_residue_nbytes(residue_nbytes) ||
      !check(numel == 0 || (src && weight && residue), "split_fp32 got the address 0")) {
    return nullptr;
  }
  {
    GilRelease released;
    if (residue_nbytes == 2) {
      kernels->split_fp32(pointer<float>(src), pointer<uint16_t>(weight),
                          pointer<uint16_t>(residue), numel);
    } else {
      kernels->split_fp24(pointer<float>(src), pointer<uint16_t>(weight), pointer<uint8_t>(residue),
                          numel);
    }
  }
  Py_RETURN_NONE;
}

PyObject* kernel_join_fp32(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"weight",         "residue", "dst",  "numel",
                                "residue_nbytes", "isa",     nullptr};
  uint64_t weight = 0, residue = 0, dst = 0, numel = 0;
  int residue_nbytes = 0;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&i|s:join_fp32", const_cast<char**>(names),
                                   convert_u64, &weight, convert_u64, &residue, convert_u64, &dst,
                                   convert_u64, &numel, &residue_nbytes, &isa)) {
    return nullptr;
  }
  const KernelSet* kernels = parse_isa(isa);
  if (!kernels || !check_residue_nbytes(residue_nbytes) ||
      !check(numel == 0 || (weight && dst), "join_fp32 got the address 0")) {
    return nullptr;
  }
  {
    GilRelease released;
    if (residue_nbytes == 2) {
      kernels->join_fp32(pointer<uint16_t>(weight), pointer<uint16_t>(residue), pointer<float>(dst),
                         numel);
    } else {
      kernels->join_fp24(pointer<uint16_t>(weight), pointer<uint8_t>(residue), pointer<float>(dst),
                         numel);
    }
  }
  Py_RETURN_NONE;
}

bool check_landing(uint64_t dst_lo, int kind, int mode) {
  const bool is_bf16 = kind == static_cast<int>(GradKind::kBf16);
  const bool needs_low = is_bf16 && mode == static_cast<int>(LandMode::kAccumulateFp32);
  return check(kind == 0 || kind == 1, "kind must be 0 (bf16) or 1 (fp32)") &&
         check(mode >= 0 && mode <= 2,
               "mode must be 0 (set), 1 (accumulate in fp32) or 2 (in the dtype)") &&
         check(!needs_low || dst_lo, "accumulating bf16 in fp32 needs dst_lo") &&
         check(is_bf16 || !dst_lo, "an fp32 gradient has no low half");
}

PyObject* kernel_grad_land(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"dst", "dst_lo", "src", "numel", "kind", "mode", "isa", nullptr};
  uint64_t dst = 0, dst_lo = 0, src = 0, numel = 0;
  int kind = 0, mode = 0;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "O&O&O&O&ii|s:grad_land", const_cast<char**>(names), convert_u64, &dst,
          convert_u64, &dst_lo, convert_u64, &src, convert_u64, &numel, &kind, &mode, &isa)) {
    return nullptr;
  }
  const KernelSet* kernels = parse_isa(isa);
  if (!kernels || !check_landing(dst_lo, kind, mode) ||
      !check(numel == 0 || (dst && src), "grad_land got the address 0")) {
    return nullptr;
  }
  double result = 0.0;
  {
    GilRelease released;
    result = kernels->grad_land({pointer<void>(dst), pointer<uint16_t>(dst_lo)}, pointer<void>(src),
                                static_cast<GradKind>(kind), static_cast<LandMode>(mode), numel);
  }
  return PyFloat_FromDouble(result);
}

PyObject* kernel_sum_squares(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"src", "src_lo", "numel", "kind", "isa", nullptr};
  uint64_t src = 0, src_lo = 0, numel = 0;
  int kind = 0;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&i|s:sum_squares", const_cast<char**>(names),
                                   convert_u64, &src, convert_u64, &src_lo, convert_u64, &numel,
                                   &kind, &isa)) {
    return nullptr;
  }
  const KernelSet* kernels = parse_isa(isa);
  if (!kernels || !check_landing(src_lo, kind, 0) ||
      !check(numel == 0 || src, "sum_squares got the address 0")) {
    return nullptr;
  }
  double result = 0.0;
  {
    GilRelease released;
    result = kernels->sum_squares(pointer<void>(src), pointer<uint16_t>(src_lo),
                                  static_cast<GradKind>(kind), numel);
  }
  return PyFloat_FromDouble(result);
}

PyObject* kernel_factor_sums(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"src",   "src_lo",   "kind",     "num_rows", "num_cols",
                                "numel", "row_sums", "col_sums", "isa",      nullptr};
  uint64_t src = 0, src_lo = 0, numel = 0, row_sums = 0, col_sums = 0;
  MatrixShape shape = {};
  int kind = 0;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&iO&O&O&O&O&|s:factor_sums",
                                   const_cast<char**>(names), convert_u64, &src, convert_u64,
                                   &src_lo, &kind, convert_u64, &shape.num_rows, convert_u64,
                                   &shape.num_cols, convert_u64, &numel, convert_u64, &row_sums,
                                   convert_u64, &col_sums, &isa)) {
    return nullptr;
  }
  const KernelSet* kernels = parse_isa(isa);
  if (!kernels || !check_landing(src_lo, kind, 0) ||
      !check(src && row_sums && col_sums, "factor_sums got the address 0") ||
      !check(shape.num_rows > 0 && shape.num_cols > 0 && shape.num_rows <= numel &&
                 shape.num_cols <= numel / shape.num_rows &&
                 numel % (shape.num_rows * shape.num_cols) == 0,
             "numel must be whole matrices of num_rows x num_cols")) {
    return nullptr;
  }
  {
    GilRelease released;
    kernels->factor_sums(pointer<void>(src), pointer<uint16_t>(src_lo), static_cast<GradKind>(kind),
                         shape, numel, pointer<double>(row_sums), pointer<double>(col_sums));
  }
  Py_RETURN_NONE;
}

// The ops of a job on planes in memory, at once and on this thread; numel may be anything.
PyObject* kernel_apply_ops(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"format", "numel", "addresses", "ops", "isa", nullptr};
  UpdateJob job;
  int format = 0;
  unsigned long long addresses[kNumPlanes];
  PyObject* ops = nullptr;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "iO&(KKKKKKKK)O|s:apply_ops", const_cast<char**>(names), &format,
          convert_u64, &job.numel, &addresses[0], &addresses[1], &addresses[2], &addresses[3],
          &addresses[4], &addresses[5], &addresses[6], &addresses[7], &ops, &isa) ||
      !parse_format(format, &job.format) || !parse_ops(ops, &job.ops)) {
    return nullptr;
  }
  char* planes[kNumPlanes];
  for (int i = 0; i < kNumPlanes; ++i) {
    planes[i] = pointer<char>(addresses[i]);
    job.planes[i].present = planes[i] != nullptr;
    job.planes[i].address = planes[i];
  }
  const std::string fault = validate_planes_and_ops(job);
  const KernelSet* kernels = parse_isa(isa);
  if (!kernels || !check(fault.empty(), fault.c_str())) {
    return nullptr;
  }
  {
    GilRelease released;
    run_kernels(job, *kernels, 0, job.numel, planes);
  }
  Py_RETURN_NONE;
}

PyObject* module_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(find_kernels("auto")->isa);
}

PyObject* module_supported_isas(PyObject*, PyObject*) {
  PyRef list(PyList_New(0));
  if (!list) {
    return nullptr;
  }
  for (const KernelSet* set : {avx512_kernels(), avx2_kernels(), portable_kernels()}) {
    PyRef name(set ? PyUnicode_FromString(set->isa) : nullptr);
    if (set && (!name || PyList_Append(list.get(), name.get()) < 0)) {
      return nullptr;
    }
  }
  return PyList_AsTuple(list.get());
}

PyObject* module_update_buffer_nbytes(PyObject*, PyObject* args) {
  uint64_t num_tiles = 0, tile_numel = 0;
  if (!PyArg_ParseTuple(args, "O&O&:update_buffer_nbytes", convert_u64, &num_tiles, convert_u64,
                        &tile_numel) ||
      !check(num_tiles <= kTilesMax && tile_numel <= kTileNumelMax,
             "num_tiles or tile_numel is out of range")) {
    return nullptr;
  }
  return PyLong_FromUnsignedLongLong(
      update_buffer_nbytes(static_cast<unsigned>(num_tiles), tile_numel));
}

PyMethodDef kernel_functions[] = {
    {"split_fp32", with_keywords(kernel_split_fp32), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"join_fp32", with_keywords(kernel_join_fp32), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"grad_land", with_keywords(kernel_grad_land), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"sum_squares", with_keywords(kernel_sum_squares), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"factor_sums", with_keywords(kernel_factor_sums), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"apply_ops", with_keywords(kernel_apply_ops), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"isa", module_isa, METH_NOARGS, nullptr},
    {"supported_isas", module_supported_isas, METH_NOARGS, nullptr},
    {"update_buffer_nbytes", module_update_buffer_nbytes, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_kernels(PyObject* module) { return PyModule_AddFunctions(module, kernel_functions); }

}  // namespace offload
