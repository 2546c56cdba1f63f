import inspect
import re
import sys

from refault import registry


def test_modules_come_ground_floor_first():
    names = [name for name, _ in registry.modules()]
    assert names[0] == "trace_events"
    assert names.index("host_mm") < names.index("kvm_model") < names.index("emu") < names.index("refault")


def test_every_tracepoint_can_be_found_by_name():
    declared = registry.all_tracepoints()
    assert len(declared) > 40
    for tracepoint in declared:
        assert registry.find_tracepoint(tracepoint.full_name) is tracepoint


def test_an_event_that_is_not_ours_has_no_tracepoint():
    assert registry.find_tracepoint("sched:sched_switch") is None


def test_no_event_is_declared_twice():
    # A room may gather its modules' tuples in one; that is the same declaration again.
    found = {}
    for tracepoint in registry.all_tracepoints():
        found[tracepoint.full_name] = tracepoint
    for module, _ in registry._declaring():
        for tracepoint in sys.modules[module].TRACEPOINTS:
            assert found[tracepoint.full_name] is tracepoint, tracepoint.full_name


def test_every_print_format_takes_the_fields_that_are_declared():
    for tracepoint in registry.all_tracepoints():
        inspect.signature(tracepoint.fmt).bind(*tracepoint.fields)


def test_events_that_linux_does_not_trace_say_what_they_are():
    own = [tp for tp in registry.all_tracepoints() if tp.system == "refault"]
    assert [tp.full_name for tp in own if not tp.doc] == []


def test_every_switch_says_what_it_leaves_out():
    switches = registry.switches()
    assert {"no-flush", "skip-start"} <= set(switches)
    assert all(switches.values())


def test_the_default_kernel_is_known():
    assert registry.profiles()[0] == "linux-6.18"


def test_every_module_of_a_model_says_what_it_does_not_model():
    told = {gap.module for gap in registry.gaps()}
    models = [
        name
        for name, path in registry.modules()
        if name.startswith(("host_mm.", "kvm_model.")) and path.name != "__init__.py"
    ]
    assert len(set(models) & told) > 0.9 * len(models), sorted(set(models) - told)


def test_the_list_of_parameters_is_what_the_models_read():
    from refault.params import PARAMS

    read = set()
    for name, path in registry.modules():
        if name.startswith(("host_mm.", "kvm_model.", "emu.")):
            source = path.read_text()
            read |= set(re.findall(r'params\.get\(\s*"([a-z_]+\.[a-z_]+)"', source))
            read |= set(re.findall(r'_flag\(\s*params,\s*"([a-z_]+\.[a-z_]+)"', source))
    assert read == set(PARAMS)
