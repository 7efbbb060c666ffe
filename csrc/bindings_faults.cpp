// The fault plan in offload._native, for tests.
#include <utility>
#include <vector>

#include "bindings.h"
#include "fault_ops.h"

namespace offload {
namespace {

constexpr double kDelaySecondsMax = 1.0;

bool parse_rule(PyObject* object, FaultRule* rule) {
  PyRef fields(PySequence_Tuple(object));
  if (!fields) {
    return false;
  }
  const char* name = nullptr;
  PyObject* at = nullptr;
  if (!PyArg_ParseTuple(fields.get(), "sOd:rule", &name, &at, &rule->rate) ||
      !parse_u64(at, &rule->at)) {
    return false;
  }
  if (!find_fault(name, &rule->kind)) {
    PyErr_Format(PyExc_ValueError, "'%s' is not a kind of fault", name);
    return false;
  }
  if (!(rule->rate >= 0 && rule->rate <= 1)) {
    PyErr_SetString(PyExc_ValueError, "a rate is 0 to 1");
    return false;
  }
  return true;
}

bool parse_rules(PyObject* object, std::vector<FaultRule>* rules) {
  PyRef items(PySequence_Tuple(object));
  if (!items) {
    return false;
  }
  rules->resize(static_cast<size_t>(PyTuple_Size(items.get())));
  for (size_t i = 0; i < rules->size(); ++i) {
    if (!parse_rule(PyTuple_GetItem(items.get(), static_cast<Py_ssize_t>(i)), &(*rules)[i])) {
      return false;
    }
  }
  return true;
}

PyObject* module_set_fault_plan(PyObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"rules", "seed", "delay_s", nullptr};
  PyObject* rules = nullptr;
  PyObject* seed = nullptr;
  FaultPlan plan;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOd:set_fault_plan", const_cast<char**>(names),
                                   &rules, &seed, &plan.delay_s) ||
      !parse_rules(rules, &plan.rules) || !parse_u64(seed, &plan.seed)) {
    return nullptr;
  }
  if (!(plan.delay_s >= 0 && plan.delay_s <= kDelaySecondsMax)) {
    PyErr_SetString(PyExc_ValueError, "delay_s is 0 to 1");
    return nullptr;
  }
  set_fault_plan(std::move(plan));
  Py_RETURN_NONE;
}

PyObject* module_clear_fault_plan(PyObject*, PyObject*) {
  clear_fault_plan();
  Py_RETURN_NONE;
}

bool add_count(PyObject* counts, const char* name, uint64_t count) {
  PyRef value(PyLong_FromUnsignedLongLong(count));
  return value && PyDict_SetItemString(counts, name, value.get()) == 0;
}

PyObject* module_fault_counts(PyObject*, PyObject*) {
  const FaultCounts seen = fault_counts();
  PyRef counts(PyDict_New());
  if (!counts || !add_count(counts.get(), "reads", seen.num_reads) ||
      !add_count(counts.get(), "writes", seen.num_writes)) {
    return nullptr;
  }
  for (int i = 0; i < kNumFaultKinds; ++i) {
    if (!add_count(counts.get(), fault_name(static_cast<FaultKind>(i)), seen.num_injected[i])) {
      return nullptr;
    }
  }
  return counts.release();
}

PyMethodDef methods[] = {
    {"set_fault_plan",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(module_set_fault_plan)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {"clear_fault_plan", module_clear_fault_plan, METH_NOARGS, nullptr},
    {"fault_counts", module_fault_counts, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace offload

int offload_add_faults(PyObject* module) { return PyModule_AddFunctions(module, offload::methods); }
