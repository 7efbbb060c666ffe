// Small helpers for hand-written bindings on CPython's limited API.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <unistd.h>

#include <cstdint>

#include "io_queue.h"

// Add the update pipeline with the kernels, and the fault plan, to the module; -1 with a Python
// error set on failure.
int offload_add_update(PyObject* module);
int offload_add_faults(PyObject* module);

namespace offload {

// False with ValueError set where there is no backend of this name.
bool parse_backend(const char* name, Backend* backend);

// The queue of a Python IoQueue that lives in this process; null with TypeError or RuntimeError
// set.
IoQueue* io_queue_of(PyObject* object);

// A forked child has the memory of its parent's queues and none of their threads, and one of these
// may have held a lock as it was forked. There nothing is used, joined or freed.
inline bool is_forked(pid_t maker) { return maker != getpid(); }

// False with RuntimeError set in a forked child.
inline bool check_not_forked(pid_t maker) {
  if (is_forked(maker)) {
    PyErr_SetString(PyExc_RuntimeError,
                    "this object belongs to the parent of this process; its threads do not survive "
                    "a fork");
    return false;
  }
  return true;
}

// Owns one reference.
class PyRef {
 public:
  explicit PyRef(PyObject* object = nullptr) : object_(object) {}
  ~PyRef() { Py_XDECREF(object_); }
  PyRef(const PyRef&) = delete;
  PyRef& operator=(const PyRef&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// Releases the GIL for a scope that touches no Python object.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() { PyEval_RestoreThread(state_); }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

// Reads a non-negative Python int; false with OverflowError or TypeError set.
inline bool parse_u64(PyObject* object, uint64_t* value) {
  *value = PyLong_AsUnsignedLongLong(object);
  return !(*value == UINT64_MAX && PyErr_Occurred());
}

// Reads a Python int that fits a C int; false with OverflowError or TypeError set.
inline bool parse_int(PyObject* object, int* value) {
  const long wide = PyLong_AsLong(object);
  if (wide == -1 && PyErr_Occurred()) {
    return false;
  }
  *value = static_cast<int>(wide);
  if (*value != wide) {
    PyErr_SetString(PyExc_OverflowError, "int does not fit 32 bits");
    return false;
  }
  return true;
}

}  // namespace offload
