// UpdatePipeline in offload._native: jobs as Python describes them, completions as they came.
#include "bindings_update.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "crc32c.h"
#include "update_job.h"
#include "update_pipeline.h"

namespace offload {
namespace {

using Completions = std::vector<UpdateCompletion>;

constexpr double kSignalSeconds = 0.2;  // how long Ctrl-C may have to wait for wait()
struct UpdatePipelineObject {
  PyObject_HEAD UpdatePipeline* pipeline;
  PyObject* queue;
  pid_t maker;
};

UpdatePipeline& pipeline_of(PyObject* self) {
  return *reinterpret_cast<UpdatePipelineObject*>(self)->pipeline;
}

pid_t maker_of(PyObject* self) { return reinterpret_cast<UpdatePipelineObject*>(self)->maker; }

bool parse_plane_segment(PyObject* object, PlaneSegment* segment) {
  PyRef fields(PySequence_Tuple(object));
  if (!fields) {
    return false;
  }
  const Py_ssize_t num_fields = PyTuple_Size(fields.get());
  uint64_t checksums = 0;
  if (!check(num_fields == 3 || num_fields == 4,
             "a plane's segment is (fd, offset, nbytes) or (fd, offset, nbytes, checksums)") ||
      !parse_int(PyTuple_GetItem(fields.get(), 0), &segment->fd) ||
      !parse_u64(PyTuple_GetItem(fields.get(), 1), &segment->offset) ||
      !parse_u64(PyTuple_GetItem(fields.get(), 2), &segment->nbytes) ||
      (num_fields == 4 && !parse_u64(PyTuple_GetItem(fields.get(), 3), &checksums))) {
    return false;
  }
  segment->checksums = pointer<uint32_t>(checksums);
  const uint64_t most = INT64_MAX;
  return check(segment->offset <= most && segment->nbytes <= most - segment->offset,
               "a segment must end below 2**63 bytes of its file") &&
         check(checksums % sizeof(uint32_t) == 0, "checksums must be on a 4-byte boundary");
}

// None, or a sequence of segments.
bool parse_plane_segments(PyObject* object, bool* present, std::vector<PlaneSegment>* segments) {
  *present = object != Py_None;
  if (!*present) {
    return true;
  }
  PyRef items(PySequence_Tuple(object));
  if (!items) {
    return false;
  }
  segments->resize(static_cast<size_t>(PyTuple_Size(items.get())));
  for (size_t i = 0; i < segments->size(); ++i) {
    if (!parse_plane_segment(PyTuple_GetItem(items.get(), static_cast<Py_ssize_t>(i)),
                             &(*segments)[i])) {
      return false;
    }
  }
  return true;
}

bool parse_plane(PyObject* object, UpdatePlane* plane) {
  plane->present = object != Py_None;
  if (!plane->present) {
    return true;
  }
  PyRef fields(PySequence_Tuple(object));
  uint64_t address = 0;
  if (!fields ||
      !check(PyTuple_Size(fields.get()) == 3,
             "a plane is (address, read segments, write segments)") ||
      !parse_u64(PyTuple_GetItem(fields.get(), 0), &address)) {
    return false;
  }
  plane->address = pointer<char>(address);
  return parse_plane_segments(PyTuple_GetItem(fields.get(), 1), &plane->has_read, &plane->read) &&
         parse_plane_segments(PyTuple_GetItem(fields.get(), 2), &plane->has_write, &plane->write);
}

bool parse_planes(PyObject* object, UpdateJob* job) {
  PyRef items(PySequence_Tuple(object));
  if (!items) {
    return false;
  }
  if (!check(PyTuple_Size(items.get()) == kNumPlanes,
             "planes must be (weight, residue, exp_avg, exp_avg_sq, exp_avg_scale, "
             "exp_avg_sq_scale, grad, grad_lo)")) {
    return false;
  }
  for (int i = 0; i < kNumPlanes; ++i) {
    if (!parse_plane(PyTuple_GetItem(items.get(), i), &job->planes[i])) {
      return false;
    }
  }
  return true;
}

bool parse_config(PyObject* args, PyObject* kwargs, UpdateConfig* config, PyObject** queue) {
  static const char* names[] = {"queue",         "num_tiles", "tile_numel",      "buffer_address",
                                "buffer_nbytes", "isa",       "checksum_nbytes", nullptr};
  const char* isa = nullptr;
  uint64_t num_tiles = 0, address = 0, nbytes = 0;
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "OO&O&O&O&s|O&:UpdatePipeline", const_cast<char**>(names), queue,
          convert_u64, &num_tiles, convert_u64, &config->tile_numel, convert_u64, &address,
          convert_u64, &nbytes, &isa, convert_u64, &config->checksum_nbytes)) {
    return false;
  }
  config->queue = io_queue_of(*queue);
  if (config->queue == nullptr ||
      !check(num_tiles >= 1 && num_tiles <= kTilesMax, "num_tiles is out of range") ||
      !check(config->tile_numel >= kTileAlignNumel && config->tile_numel <= kTileNumelMax &&
                 config->tile_numel % kTileAlignNumel == 0,
             "tile_numel is out of range or not a multiple of 4096") ||
      !check(config->checksum_nbytes <= kChecksumNbytesMax &&
                 config->checksum_nbytes % kPageNbytes == 0,
             "checksum_nbytes is out of range or not a multiple of 4096") ||
      !check(config->queue->pack_stride() == 0 ||
                 config->checksum_nbytes == config->queue->checksum_nbytes(),
             "a queue that packs and its pipeline need the same checksum_nbytes") ||
      !check(address != 0 && address % kPageNbytes == 0,
             "buffer_address must be on a 4 KiB boundary") ||
      !check(nbytes >= update_buffer_nbytes(static_cast<unsigned>(num_tiles), config->tile_numel),
             "the buffer is smaller than update_buffer_nbytes(num_tiles, tile_numel)")) {
    return false;
  }
  config->num_tiles = static_cast<unsigned>(num_tiles);
  config->buffer = pointer<char>(address);
  config->kernels = parse_isa(isa);
  return config->kernels != nullptr;
}

PyObject* pipeline_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  UpdateConfig config = {};
  PyObject* queue = nullptr;
  if (!parse_config(args, kwargs, &config, &queue)) {
    return nullptr;
  }
  int error = 0;
  std::unique_ptr<UpdatePipeline> pipeline;
  {
    GilRelease released;
    pipeline = UpdatePipeline::create(config, &error);
  }
  if (!pipeline) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* self = allocate(type, 0);
  if (self) {
    reinterpret_cast<UpdatePipelineObject*>(self)->pipeline = pipeline.release();
    reinterpret_cast<UpdatePipelineObject*>(self)->queue = Py_NewRef(queue);
    reinterpret_cast<UpdatePipelineObject*>(self)->maker = getpid();
  }
  return self;
}

void pipeline_dealloc(PyObject* self) {
  UpdatePipeline* pipeline = reinterpret_cast<UpdatePipelineObject*>(self)->pipeline;
  if (pipeline && !is_forked(maker_of(self))) {
    GilRelease released;
    delete pipeline;
  }
  Py_XDECREF(reinterpret_cast<UpdatePipelineObject*>(self)->queue);  // behind its last transfer
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* pipeline_submit(PyObject* self, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"tag", "format", "numel", "planes", "ops", "write_all", nullptr};
  UpdateJob job;
  int format = 0;
  PyObject* planes = nullptr;
  PyObject* ops = nullptr;
  int write_all = 0;
  if (!check_not_forked(maker_of(self)) ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "O&iO&OO|p:submit", const_cast<char**>(names),
                                   convert_u64, &job.tag, &format, convert_u64, &job.numel, &planes,
                                   &ops, &write_all) ||
      !parse_format(format, &job.format) || !parse_planes(planes, &job) ||
      !parse_ops(ops, &job.ops)) {
    return nullptr;
  }
  job.write_all = write_all != 0;
  const UpdateConfig& config = pipeline_of(self).config();
  const std::string fault = validate_job(job, config.tile_numel, config.checksum_nbytes);
  if (!check(fault.empty(), fault.c_str())) {
    return nullptr;
  }
  if (!pipeline_of(self).submit(std::move(job))) {
    PyErr_SetString(PyExc_RuntimeError, "submit on a closed UpdatePipeline");
    return nullptr;
  }
  Py_RETURN_NONE;
}

// ((fd, bytes), ...)
PyObject* tuple_of(const std::vector<std::pair<int, uint64_t>>& written) {
  PyRef tuple(PyTuple_New(static_cast<Py_ssize_t>(written.size())));
  if (!tuple) {
    return nullptr;
  }
  for (size_t i = 0; i < written.size(); ++i) {
    PyObject* item =
        Py_BuildValue("(iK)", written[i].first, static_cast<unsigned long long>(written[i].second));
    if (!item || PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(i), item) < 0) {
      return nullptr;
    }
  }
  return tuple.release();
}

PyObject* list_of(const Completions& completions) {
  PyRef list(PyList_New(static_cast<Py_ssize_t>(completions.size())));
  if (!list) {
    return nullptr;
  }
  for (size_t i = 0; i < completions.size(); ++i) {
    const UpdateCompletion& one = completions[i];
    PyObject* item = Py_BuildValue(
        "(KLiKKKddN)", static_cast<unsigned long long>(one.tag), static_cast<long long>(one.result),
        one.fd, static_cast<unsigned long long>(one.offset),
        static_cast<unsigned long long>(one.read_bytes),
        static_cast<unsigned long long>(one.write_bytes), one.seconds, one.kernel_seconds,
        tuple_of(one.written));  // null makes the call fail, with its error
    if (!item || PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), item) < 0) {
      return nullptr;
    }
  }
  return list.release();
}

PyObject* pipeline_poll(PyObject* self, PyObject*) {
  if (!check_not_forked(maker_of(self))) {
    return nullptr;
  }
  Completions completions;
  pipeline_of(self).poll(completions);
  return list_of(completions);
}

PyObject* pipeline_wait(PyObject* self, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"timeout_s", nullptr};
  double timeout_s = 0.0;
  if (!check_not_forked(maker_of(self)) ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "d:wait", const_cast<char**>(names), &timeout_s)) {
    return nullptr;
  }
  UpdatePipeline& pipeline = pipeline_of(self);
  Completions completions;
  const auto begin = std::chrono::steady_clock::now();
  double remaining_s = timeout_s;
  for (;;) {
    {
      GilRelease released;
      pipeline.wait(std::min(remaining_s, kSignalSeconds), completions);
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    remaining_s = timeout_s - elapsed.count();
    if (!completions.empty() || pipeline.is_closed() || !(remaining_s > 0)) {
      return list_of(completions);
    }
    if (PyErr_CheckSignals() < 0) {
      return nullptr;
    }
  }
}

PyObject* pipeline_close(PyObject* self, PyObject*) {
  if (!is_forked(maker_of(self))) {
    GilRelease released;
    pipeline_of(self).close();
  }
  Py_RETURN_NONE;
}

PyMethodDef pipeline_methods[] = {
    {"submit", with_keywords(pipeline_submit), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"poll", pipeline_poll, METH_NOARGS, nullptr},
    {"wait", with_keywords(pipeline_wait), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"close", pipeline_close, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot pipeline_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(pipeline_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(pipeline_dealloc)},
    {Py_tp_methods, pipeline_methods},
    {0, nullptr},
};

PyType_Spec pipeline_spec = {"offload._native.UpdatePipeline", sizeof(UpdatePipelineObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, pipeline_slots};

}  // namespace
}  // namespace offload

int offload_add_update(PyObject* module) {
  offload::PyRef type(PyType_FromModuleAndSpec(module, &offload::pipeline_spec, nullptr));
  if (!type || PyModule_AddObjectRef(module, "UpdatePipeline", type.get()) < 0) {
    return -1;
  }
  if (offload::add_crc32c(module) < 0 || offload::add_pack(module) < 0) {
    return -1;
  }
  return offload::add_kernels(module);
}
