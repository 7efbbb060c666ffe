// Packing in offload._native, without the GIL.
#include <cstring>

#include "bindings.h"
#include "bindings_update.h"
#include "pack.h"

namespace offload {
namespace {

const PackIsa* find_pack_isa(const char* name) {
  for (size_t i = 0; const PackIsa* isa = pack_isa(i); ++i) {
    if (std::strcmp(name, "auto") == 0 || std::strcmp(name, isa->name) == 0) {
      return isa;
    }
  }
  PyErr_Format(PyExc_ValueError, "isa '%s' is unknown or not on this CPU; see pack_isas()", name);
  return nullptr;
}

bool check_block(uint64_t item_nbytes, uint64_t nbytes) {
  return check((item_nbytes == 2 || item_nbytes == 4) &&
                   is_packable(static_cast<unsigned>(item_nbytes), nbytes),
               "packing takes items of 2 or 4 bytes, in groups of 64");
}

PyObject* module_pack_block(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"item_nbytes", "address", "nbytes", "out_address",
                                "out_nbytes",  "isa",     nullptr};
  uint64_t item_nbytes = 0, address = 0, nbytes = 0, out_address = 0, out_nbytes = 0;
  const char* isa_name = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&O&|s:pack_block",
                                   const_cast<char**>(names), convert_u64, &item_nbytes,
                                   convert_u64, &address, convert_u64, &nbytes, convert_u64,
                                   &out_address, convert_u64, &out_nbytes, &isa_name)) {
    return nullptr;
  }
  const PackIsa* isa = find_pack_isa(isa_name);
  if (!isa || !check_block(item_nbytes, nbytes) ||
      !check(address != 0 && out_address != 0, "pack_block got the address 0") ||
      !check(nbytes <= UINT64_MAX - kPackSlackNbytes && out_nbytes >= nbytes + kPackSlackNbytes,
             "pack_block needs room for 512 bytes more than it packs")) {
    return nullptr;
  }
  uint64_t length = 0;
  {
    GilRelease released;
    length = isa->pack(static_cast<unsigned>(item_nbytes), pointer<char>(address), nbytes,
                       pointer<char>(out_address));
  }
  return PyLong_FromUnsignedLongLong(length);
}

PyObject* module_unpack_block(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"item_nbytes", "address", "packed_nbytes", "out_address",
                                "nbytes",      "isa",     nullptr};
  uint64_t item_nbytes = 0, address = 0, packed_nbytes = 0, out_address = 0, nbytes = 0;
  const char* isa_name = "auto";
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&O&|s:unpack_block",
                                   const_cast<char**>(names), convert_u64, &item_nbytes,
                                   convert_u64, &address, convert_u64, &packed_nbytes, convert_u64,
                                   &out_address, convert_u64, &nbytes, &isa_name)) {
    return nullptr;
  }
  const PackIsa* isa = find_pack_isa(isa_name);
  if (!isa || !check_block(item_nbytes, nbytes) ||
      !check(address != 0 && out_address != 0, "unpack_block got the address 0")) {
    return nullptr;
  }
  bool is_right = false;
  {
    GilRelease released;
    is_right = isa->unpack(static_cast<unsigned>(item_nbytes), pointer<char>(address),
                           packed_nbytes, pointer<char>(out_address), nbytes);
  }
  return PyBool_FromLong(is_right);
}

PyObject* module_unpack_run(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"item_nbytes",  "address", "nbytes",
                                "block_nbytes", "lengths", nullptr};
  uint64_t item_nbytes = 0, address = 0, nbytes = 0, block_nbytes = 0, lengths = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&O&O&O&:unpack_run", const_cast<char**>(names),
                                   convert_u64, &item_nbytes, convert_u64, &address, convert_u64,
                                   &nbytes, convert_u64, &block_nbytes, convert_u64, &lengths) ||
      !check_block(item_nbytes, nbytes) || !check_block(item_nbytes, block_nbytes) ||
      !check(block_nbytes > 0 && block_nbytes <= kPackBlockNbytesMax,
             "block_nbytes must be 1 to 65536") ||
      !check(address != 0 && lengths != 0, "unpack_run got the address 0") ||
      !check(lengths % sizeof(uint32_t) == 0, "lengths must be on a 4-byte boundary") ||
      !check(are_lengths(pointer<uint32_t>(lengths), nbytes, block_nbytes),
             "a packed block is longer than a plain one")) {
    return nullptr;
  }
  bool is_right = false;
  {
    GilRelease released;
    is_right = unpack_run(static_cast<unsigned>(item_nbytes), pointer<char>(address), nbytes,
                          block_nbytes, pointer<uint32_t>(lengths));
  }
  return PyBool_FromLong(is_right);
}

PyObject* module_pack_isas(PyObject*, PyObject*) {
  PyRef list(PyList_New(0));
  if (!list) {
    return nullptr;
  }
  for (size_t i = 0; const PackIsa* isa = pack_isa(i); ++i) {
    PyRef name(PyUnicode_FromString(isa->name));
    if (!name || PyList_Append(list.get(), name.get()) < 0) {
      return nullptr;
    }
  }
  return PyList_AsTuple(list.get());
}

PyMethodDef pack_functions[] = {
    {"pack_block", with_keywords(module_pack_block), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"unpack_block", with_keywords(module_unpack_block), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"unpack_run", with_keywords(module_unpack_run), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"pack_isas", module_pack_isas, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_pack(PyObject* module) { return PyModule_AddFunctions(module, pack_functions); }

}  // namespace offload
