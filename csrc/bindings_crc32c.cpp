// Checksums in offload._native, computed without the GIL.
#include <cstring>

#include "bindings.h"
#include "bindings_update.h"
#include "crc32c.h"

namespace offload {
namespace {

Crc32cFunction find_crc32c(const char* name) {
  for (size_t i = 0; const Crc32cIsa* isa = crc32c_isa(i); ++i) {
    if (std::strcmp(name, "auto") == 0 || std::strcmp(name, isa->name) == 0) {
      return isa->function;
    }
  }
  PyErr_Format(PyExc_ValueError, "isa '%s' is unknown or not on this CPU; see crc32c_isas()", name);
  return nullptr;
}

PyObject* module_crc32c(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"address", "nbytes", "isa", nullptr};
  uint64_t address = 0, nbytes = 0;
  const char* isa = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&|s:crc32c", const_cast<char**>(names),
                                   convert_u64, &address, convert_u64, &nbytes, &isa)) {
    return nullptr;
  }
  const Crc32cFunction function = find_crc32c(isa);
  if (!function || !check(nbytes == 0 || address != 0, "crc32c got the address 0")) {
    return nullptr;
  }
  uint32_t result = 0;
  {
    GilRelease released;
    result = function(pointer<void>(address), nbytes);
  }
  return PyLong_FromUnsignedLong(result);
}

PyObject* module_crc32c_blocks(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"address", "nbytes", "block_nbytes", "out_address", nullptr};
  uint64_t address = 0, nbytes = 0, block_nbytes = 0, out_address = 0;
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "O&O&O&O&:crc32c_blocks", const_cast<char**>(names), convert_u64, &address,
          convert_u64, &nbytes, convert_u64, &block_nbytes, convert_u64, &out_address) ||
      !check(block_nbytes >= 1 && block_nbytes <= kChecksumNbytesMax,
             "block_nbytes must be 1 to 2**30") ||
      !check(nbytes == 0 || (address != 0 && out_address != 0),
             "crc32c_blocks got the address 0") ||
      !check(out_address % sizeof(uint32_t) == 0, "out_address must be on a 4-byte boundary")) {
    return nullptr;
  }
  {
    GilRelease released;
    crc32c_blocks(pointer<void>(address), nbytes, block_nbytes, pointer<uint32_t>(out_address));
  }
  Py_RETURN_NONE;
}

PyObject* module_crc32c_isas(PyObject*, PyObject*) {
  PyRef list(PyList_New(0));
  if (!list) {
    return nullptr;
  }
  for (size_t i = 0; const Crc32cIsa* isa = crc32c_isa(i); ++i) {
    PyRef name(PyUnicode_FromString(isa->name));
    if (!name || PyList_Append(list.get(), name.get()) < 0) {
      return nullptr;
    }
  }
  return PyList_AsTuple(list.get());
}

PyMethodDef crc32c_functions[] = {
    {"crc32c", with_keywords(module_crc32c), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"crc32c_blocks", with_keywords(module_crc32c_blocks), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"crc32c_isas", module_crc32c_isas, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_crc32c(PyObject* module) { return PyModule_AddFunctions(module, crc32c_functions); }

}  // namespace offload
