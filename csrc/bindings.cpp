// offload._native: Python sees addresses as ints, sizes in bytes, and results as they came.
#include "bindings.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "crc32c.h"
#include "io_queue.h"
#include "pack.h"

namespace offload {

bool parse_backend(const char* name, Backend* backend) {
  const std::string text(name);
  if (text == "uring") {
    *backend = Backend::kUring;
  } else if (text == "threads") {
    *backend = Backend::kThreads;
  } else if (text == "faults") {
    *backend = Backend::kFaults;
  } else {
    PyErr_Format(PyExc_ValueError, "backend must be 'uring' or 'threads', not '%s'", name);
    return false;
  }
  return true;
}

namespace {

using Completions = std::vector<IoCompletion>;

constexpr double kSignalSeconds = 0.2;  // how long Ctrl-C may have to wait for wait()

struct IoQueueObject {
  PyObject_HEAD IoQueue* queue;
  pid_t maker;
};

IoQueue& queue_of(PyObject* self) { return *reinterpret_cast<IoQueueObject*>(self)->queue; }

pid_t maker_of(PyObject* self) { return reinterpret_cast<IoQueueObject*>(self)->maker; }

bool check_range(const char* name, long long value, long long least, long long most) {
  if (value < least || value > most) {
    PyErr_Format(PyExc_ValueError, "%s must be %lld to %lld, not %lld", name, least, most, value);
    return false;
  }
  return true;
}

bool check_limits(Backend backend, int depth, Py_ssize_t block_nbytes, int num_threads,
                  Py_ssize_t checksum_nbytes, Py_ssize_t pack_stride) {
  if (!check_range("depth", depth, 1, kDepthMax) ||
      !check_range("block_nbytes", block_nbytes, kPageNbytes, kBlockNbytesMax) ||
      !check_range("checksum_nbytes", checksum_nbytes, 0, kChecksumNbytesMax) ||
      !check_range("pack_stride", pack_stride, 0, PY_SSIZE_T_MAX) ||
      (pack_stride > 0 &&
       !check_range("checksum_nbytes", checksum_nbytes, kPageNbytes, kPackBlockNbytesMax))) {
    return false;
  }
  if (block_nbytes % kPageNbytes != 0 || checksum_nbytes % kPageNbytes != 0) {
    PyErr_Format(PyExc_ValueError,
                 "block_nbytes and checksum_nbytes must be a multiple of 4096, not %zd and %zd",
                 block_nbytes, checksum_nbytes);
    return false;
  }
  return backend == Backend::kUring || check_range("num_threads", num_threads, 1, kThreadsMax);
}

PyObject* io_queue_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"backend",         "depth",       "block_nbytes", "num_threads",
                                "checksum_nbytes", "pack_stride", nullptr};
  const char* backend_name = nullptr;
  int depth = 0;
  Py_ssize_t block_nbytes = 0;
  int num_threads = 0;
  Py_ssize_t checksum_nbytes = 0;
  Py_ssize_t pack_stride = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sini|nn:IoQueue", const_cast<char**>(names),
                                   &backend_name, &depth, &block_nbytes, &num_threads,
                                   &checksum_nbytes, &pack_stride)) {
    return nullptr;
  }
  Backend backend;
  if (!parse_backend(backend_name, &backend) ||
      !check_limits(backend, depth, block_nbytes, num_threads, checksum_nbytes, pack_stride)) {
    return nullptr;
  }
  int error = 0;
  std::unique_ptr<IoQueue> queue;
  {
    GilRelease released;
    queue =
        IoQueue::create(backend, static_cast<unsigned>(depth), static_cast<size_t>(block_nbytes),
                        static_cast<unsigned>(num_threads), &error,
                        static_cast<uint64_t>(checksum_nbytes), static_cast<uint64_t>(pack_stride));
  }
  if (queue == nullptr) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* self = allocate(type, 0);
  if (self != nullptr) {
    reinterpret_cast<IoQueueObject*>(self)->queue = queue.release();
    reinterpret_cast<IoQueueObject*>(self)->maker = getpid();
  }
  return self;
}

void io_queue_dealloc(PyObject* self) {
  IoQueue* queue = reinterpret_cast<IoQueueObject*>(self)->queue;
  if (queue != nullptr && !is_forked(maker_of(self))) {
    GilRelease released;
    delete queue;
  }
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

}  // namespace

IoQueue* io_queue_of(PyObject* object) {
  // The type has no subclasses, so its way to die is its own.
  void* const dealloc = PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc);
  if (dealloc != reinterpret_cast<void*>(io_queue_dealloc)) {
    PyErr_SetString(PyExc_TypeError, "queue must be an IoQueue");
    return nullptr;
  }
  return check_not_forked(maker_of(object)) ? &queue_of(object) : nullptr;
}

namespace {

PyObject* io_queue_backend(PyObject* self, PyObject*) {
  return PyUnicode_FromString(queue_of(self).backend_name());
}

bool check_segment(const IoSegment& segment) {
  const uint64_t most = INT64_MAX;
  if (segment.offset <= most && segment.nbytes <= most - segment.offset) {
    return true;
  }
  PyErr_SetString(PyExc_OverflowError, "a segment must end below 2**63 bytes of its file");
  return false;
}

// Where blocks begin is the caller's to know: they count from the start of a piece.
bool check_checksums(const IoSegment& segment, uint64_t checksum_nbytes) {
  if (segment.checksums && checksum_nbytes == 0) {
    PyErr_SetString(PyExc_ValueError, "a segment has checksums, the queue's checksum_nbytes is 0");
    return false;
  }
  if (reinterpret_cast<uintptr_t>(segment.checksums) % sizeof(uint32_t) != 0) {
    PyErr_SetString(PyExc_ValueError, "checksums must be on a 4-byte boundary");
    return false;
  }
  return true;
}

// Whether a segment can be a run.
bool check_run(const IoSegment& segment, uint64_t item_nbytes, uint64_t pack_stride) {
  if (pack_stride > 0 && segment.checksums && (item_nbytes == 2 || item_nbytes == 4) &&
      segment.nbytes % (item_nbytes * kPackGroupNumel) == 0 && segment.nbytes <= kBlockNbytesMax) {
    return true;
  }
  PyErr_SetString(PyExc_ValueError,
                  "a run needs a queue that packs, checksums, items of 2 or 4 bytes, and whole "
                  "groups of 64 of them");
  return false;
}

bool parse_segment(PyObject* object, const IoQueue& queue, IoSegment* segment) {
  PyRef fields(PySequence_Tuple(object));
  if (!fields) {
    return false;
  }
  const Py_ssize_t num_fields = PyTuple_Size(fields.get());
  if (num_fields < 4 || num_fields > 6) {
    PyErr_SetString(PyExc_ValueError,
                    "a segment is (fd, offset, address, nbytes), and then may have checksums and, "
                    "for a run, item_nbytes");
    return false;
  }
  uint64_t address = 0;
  uint64_t checksums = 0;
  uint64_t item_nbytes = 0;
  if (!parse_int(PyTuple_GetItem(fields.get(), 0), &segment->fd) ||
      !parse_u64(PyTuple_GetItem(fields.get(), 1), &segment->offset) ||
      !parse_u64(PyTuple_GetItem(fields.get(), 2), &address) ||
      !parse_u64(PyTuple_GetItem(fields.get(), 3), &segment->nbytes) ||
      (num_fields >= 5 && !parse_u64(PyTuple_GetItem(fields.get(), 4), &checksums)) ||
      (num_fields == 6 && !parse_u64(PyTuple_GetItem(fields.get(), 5), &item_nbytes))) {
    return false;
  }
  segment->address = reinterpret_cast<void*>(static_cast<uintptr_t>(address));
  segment->checksums = reinterpret_cast<uint32_t*>(static_cast<uintptr_t>(checksums));
  segment->item_nbytes = static_cast<unsigned>(item_nbytes);
  return check_segment(*segment) && check_checksums(*segment, queue.checksum_nbytes()) &&
         (item_nbytes == 0 || check_run(*segment, item_nbytes, queue.pack_stride()));
}

bool parse_segments(PyObject* object, const IoQueue& queue, std::vector<IoSegment>* segments) {
  PyRef items(PySequence_Tuple(object));
  if (!items) {
    return false;
  }
  segments->resize(static_cast<size_t>(PyTuple_Size(items.get())));
  for (size_t i = 0; i < segments->size(); ++i) {
    if (!parse_segment(PyTuple_GetItem(items.get(), static_cast<Py_ssize_t>(i)), queue,
                       &(*segments)[i])) {
      return false;
    }
  }
  return true;
}

PyObject* io_queue_submit(PyObject* self, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"op", "tag", "priority", "segments", nullptr};
  int op = 0;
  PyObject* tag_object = nullptr;
  int priority = 0;
  PyObject* segments_object = nullptr;
  uint64_t tag = 0;
  std::vector<IoSegment> segments;
  if (!check_not_forked(maker_of(self)) ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "iOiO:submit", const_cast<char**>(names), &op,
                                   &tag_object, &priority, &segments_object) ||
      !parse_u64(tag_object, &tag) || !parse_segments(segments_object, queue_of(self), &segments)) {
    return nullptr;
  }
  if (op != kOpRead && op != kOpWrite) {
    PyErr_Format(PyExc_ValueError, "op must be OP_READ or OP_WRITE, not %d", op);
    return nullptr;
  }
  // The table's lock is held for moments only, so the GIL can stay.
  if (!queue_of(self).submit(op, tag, priority, segments.data(), segments.size())) {
    PyErr_SetString(PyExc_RuntimeError, "submit on a closed IoQueue");
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* list_of(const Completions& completions) {
  PyRef list(PyList_New(static_cast<Py_ssize_t>(completions.size())));
  if (!list) {
    return nullptr;
  }
  for (size_t i = 0; i < completions.size(); ++i) {
    const IoCompletion& one = completions[i];
    PyObject* item = Py_BuildValue("(KLiKd)", static_cast<unsigned long long>(one.tag),
                                   static_cast<long long>(one.result), one.fd,
                                   static_cast<unsigned long long>(one.offset), one.seconds);
    if (item == nullptr || PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), item) < 0) {
      return nullptr;
    }
  }
  return list.release();
}

PyObject* io_queue_poll(PyObject* self, PyObject*) {
  if (!check_not_forked(maker_of(self))) {
    return nullptr;
  }
  Completions completions;
  queue_of(self).poll(completions);
  return list_of(completions);
}

PyObject* io_queue_wait(PyObject* self, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"timeout_s", nullptr};
  double remaining_s = 0;
  if (!check_not_forked(maker_of(self)) ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "d:wait", const_cast<char**>(names),
                                   &remaining_s)) {
    return nullptr;
  }
  IoQueue& queue = queue_of(self);
  Completions completions;
  const auto begin = std::chrono::steady_clock::now();
  const double timeout_s = remaining_s;
  for (;;) {
    {
      GilRelease released;
      queue.wait(std::min(remaining_s, kSignalSeconds), completions);
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    remaining_s = timeout_s - elapsed.count();
    if (!completions.empty() || queue.is_closed() || !(remaining_s > 0)) {
      return list_of(completions);
    }
    if (PyErr_CheckSignals() < 0) {
      return nullptr;
    }
  }
}

PyObject* io_queue_stats(PyObject* self, PyObject*) {
  const IoStats stats = queue_of(self).stats();
  return Py_BuildValue("{s:K,s:K,s:K,s:K,s:K}", "read_bytes",
                       static_cast<unsigned long long>(stats.read_bytes), "write_bytes",
                       static_cast<unsigned long long>(stats.write_bytes), "num_short",
                       static_cast<unsigned long long>(stats.num_short), "num_retries",
                       static_cast<unsigned long long>(stats.num_retries), "num_in_flight",
                       static_cast<unsigned long long>(stats.num_in_flight));
}

PyObject* io_queue_close(PyObject* self, PyObject*) {
  if (!is_forked(maker_of(self))) {
    GilRelease released;
    queue_of(self).close();
  }
  Py_RETURN_NONE;
}

PyCFunction with_keywords(PyCFunctionWithKeywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef io_queue_methods[] = {
    {"backend", io_queue_backend, METH_NOARGS, nullptr},
    {"submit", with_keywords(io_queue_submit), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"poll", io_queue_poll, METH_NOARGS, nullptr},
    {"wait", with_keywords(io_queue_wait), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"stats", io_queue_stats, METH_NOARGS, nullptr},
    {"close", io_queue_close, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot io_queue_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(io_queue_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(io_queue_dealloc)},
    {Py_tp_methods, io_queue_methods},
    {0, nullptr},
};

PyType_Spec io_queue_spec = {"offload._native.IoQueue", sizeof(IoQueueObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, io_queue_slots};

PyObject* module_uring_probe(PyObject*, PyObject*) { return PyLong_FromLong(uring_probe()); }

PyMethodDef module_methods[] = {
    {"uring_probe", module_uring_probe, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int execute(PyObject* module) {
  PyRef type(PyType_FromModuleAndSpec(module, &io_queue_spec, nullptr));
  if (!type || PyModule_AddObjectRef(module, "IoQueue", type.get()) < 0 ||
      PyModule_AddIntConstant(module, "OP_READ", kOpRead) < 0 ||
      PyModule_AddIntConstant(module, "OP_WRITE", kOpWrite) < 0 ||
      PyModule_AddIntConstant(module, "PRIORITY_DEMAND", kPriorityDemand) < 0 ||
      PyModule_AddIntConstant(module, "PRIORITY_PREFETCH", kPriorityPrefetch) < 0 ||
      PyModule_AddIntConstant(module, "PRIORITY_WRITE_BACK", kPriorityWriteBack) < 0) {
    return -1;
  }
  return offload_add_faults(module) < 0 ? -1 : offload_add_update(module);
}

PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    {0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "offload._native", nullptr, 0,      module_methods,
    module_slots,          nullptr,           nullptr, nullptr};

}  // namespace

}  // namespace offload

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&offload::module_definition); }
