"""The files for a cluster agree with each other, with the configuration and with the package."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.run.plan import MachineResources, asks_wanted, plan_workers
from pipeline.run.prometheus import COUNTERS, GAUGES

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs" / "cluster"
UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}


@pytest.fixture(scope="module")
def ray_job():
    (document,) = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())
    return document


@pytest.fixture(scope="module")
def instructions():
    """The Dockerfile's instructions as (name, argument), comments dropped."""
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def test_the_image_has_the_compiler_that_triton_calls_at_run_time():
    text = (CLUSTER / "Dockerfile").read_text()
    (installed,) = re.findall(r"apt-get install --no-install-recommends --yes ([a-z0-9 -]+)", text)
    assert {"gcc", "libc6-dev"} <= set(installed.split())


def containers(ray_job):
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def n_bytes(quantity):
    number, unit = re.fullmatch(r"(\d+)([GM]i)?", quantity).groups()
    return int(number) * UNITS.get(unit, 1)


def configured(ray_job):
    """The job's configuration: its entrypoint, as a shell splits it, on the files of this checkout."""
    program, command, path, *overrides = shlex.split(ray_job["spec"]["entrypoint"])
    assert (program, command) == ("legrad", "annotate")
    return load_config(ROOT / Path(path).relative_to("/opt/legrad"), overrides)


def test_the_job_is_one_that_kuberay_and_ray_know(ray_job):
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = ray_job["spec"]["rayClusterSpec"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "configs" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert cluster["rayVersion"] == pinned["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert len({container["image"] for container in containers(ray_job)}) == 1


def test_the_entrypoint_is_a_valid_command_on_files_that_the_image_holds(ray_job, instructions):
    config = configured(ray_job)
    # the shell must not have expanded or cut them
    assert config.input.shards == "s3://my-corpus/{00000..09999}.tar"
    assert config.output.dir.startswith("s3://")
    assert ("WORKDIR", "/opt/legrad") in instructions
    assert ("COPY", "configs configs") in instructions


def test_the_workers_fill_the_machine_and_fit_in_it(ray_job):
    head, worker = containers(ray_job)
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = worker["resources"]["limits"]
    assert limits == worker["resources"]["requests"]
    gpus, cpus = int(limits["nvidia.com/gpu"]), int(limits["cpu"])
    head_start = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    machines = [MachineResources(int(head_start["num-cpus"]), node_id="head")]
    machines += [MachineResources(cpus, gpus, f"worker {number}") for number in range(group["replicas"])]
    run = configured(ray_job).run
    plan = plan_workers(run, machines, shards=10_000)
    assert ([shape.gpus for shape in plan.shapes], plan.ask.device) == (8 * [1], "cuda")
    assert sum(shape.cpus for shape in plan.shapes) == group["replicas"] * cpus
    assert not [note for note in plan.notes if "get no worker" in note]
    store = int(group["rayStartParams"]["object-store-memory"])
    shared = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}["shared-memory"]
    assert store <= n_bytes(shared["emptyDir"]["sizeLimit"])
    assert len(plan.shapes) * run.lookahead_bytes + store < n_bytes(limits["memory"]) / 2
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_machines_that_are_created_on_demand_are_those_that_the_job_asks_for(ray_job):
    cluster = ray_job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    # what the head of the file says to change is there
    assert cluster["enableInTreeAutoscaling"] is False
    assert {"replicas", "minReplicas", "maxReplicas"} <= set(group)
    _, worker = containers(ray_job)
    limits, run = worker["resources"]["limits"], configured(ray_job).run
    head = [MachineResources(int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]), node_id="head")]
    plan = plan_workers(run, head, shards=10_000)
    assert plan.shapes == ()
    assert asks_wanted(run, plan, 10_000) == 1
    assert (plan.ask.cpus <= int(limits["cpu"]), plan.ask.gpus) == (True, 1)


def test_every_mounted_volume_is_there_and_every_pod_serves_metrics(ray_job):
    cluster = ray_job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        assert ports["metrics"] == group["rayStartParams"]["metrics-export-port"]


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((CLUSTER / "grafana-dashboard.json").read_text())


def test_the_dashboard_has_what_grafana_needs_to_import_it(dashboard):
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    assert "id" not in dashboard  # the number of a dashboard in another Grafana
    source, output = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (output["name"], output["type"], output["multi"]) == ("output", "query", True)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert output["datasource"] == chosen
    for panel in dashboard["panels"]:
        assert {"type", "title", "gridPos", "targets", "fieldConfig", "options"} <= panel.keys()
        assert panel["datasource"] == chosen
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        assert all(target["datasource"] == chosen for target in panel["targets"])


def test_no_two_panels_of_the_dashboard_overlap(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_shows_every_metric_under_its_name_on_the_endpoint(dashboard):
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    # Ray puts ray_ before each name, and Prometheus' format _total after that of a counter
    served = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    assert set(re.findall(r"ray_\w+", " ".join(expressions))) == served
    for expression in expressions:
        selectors = re.findall(r"ray_\w+(\{[^}]*\})?", expression)
        assert all('output=~"$output"' in selector for selector in selectors), expression
        assert expression.count("(") == expression.count(")"), expression
        for name, interval in re.findall(r"(ray_\w+)\{[^}]*\}(\[[^]]+\])?", expression):
            # the total of workers lost is shown as it is
            is_rate = name.endswith("_total") and name != "ray_legrad_workers_lost_total"
            assert (interval == "[$__rate_interval]") is is_rate or interval == "[30m]", expression


def test_the_dashboard_groups_by_labels_that_the_metrics_have(dashboard):
    tags = {
        **{f"ray_{name}_total": tag for name, (_, tag) in COUNTERS.items()},
        **{f"ray_{name}": tag for name, (_, tag) in GAUGES.items()},
    }
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            allowed = {"output", *(tags[name] for name in re.findall(r"ray_\w+", target["expr"]))}
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            for names in grouped:
                assert set(names.split(", ")) <= allowed, target["expr"]
            for name in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert name in grouped[0], target["expr"]


def test_the_image_copies_what_is_there_and_what_its_builder_may_see(instructions):
    seen = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for name, argument in instructions:
        if name == "COPY":
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in seen


def test_the_image_installs_the_tested_versions_and_does_not_run_as_root(instructions):
    commands = [argument for name, argument in instructions if name == "RUN"]
    assert any("pip install" in text and "configs/constraints.txt" in text for text in commands)
    assert [argument for name, argument in instructions if name == "USER"] == ["ray"]


def test_the_page_names_every_file_that_lies_beside_it():
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").rglob("*"):
        if path.is_file() and path.name not in {"README.md", "Dockerfile.dockerignore"}:
            assert f"`{path.relative_to(ROOT / 'configs')}`" in page, path
