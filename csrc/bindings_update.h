// What the bindings of the update pipeline and of the kernels share.
#pragma once

#include <cstdint>
#include <vector>

#include "bindings.h"
#include "kernels.h"
#include "update_job.h"

namespace offload {

inline PyCFunction with_keywords(PyCFunctionWithKeywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// For the "O&" format: a non-negative int.
inline int convert_u64(PyObject* object, void* value) {
  return parse_u64(object, static_cast<uint64_t*>(value)) ? 1 : 0;
}

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Passes a condition on; sets ValueError where it is false.
inline bool check(bool condition, const char* message) {
  if (!condition) {
    PyErr_SetString(PyExc_ValueError, message);
  }
  return condition;
}

// Null, or false, with ValueError set.
const KernelSet* parse_isa(const char* isa);
bool parse_format(int value, StateFormat* format);

// bytes of packed records (see OpRecord) to ops; false with an error set.
bool parse_ops(PyObject* object, std::vector<UpdateOp>* ops);

// Add the functions of the kernels, of the checksums and of packing; -1 with a Python error set on
// failure.
int add_kernels(PyObject* module);
int add_crc32c(PyObject* module);
int add_pack(PyObject* module);

}  // namespace offload
