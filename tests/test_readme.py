"""The README says what the saved outputs say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import demo_table, train_step
from benchmarks.actions import table as actions_table
from benchmarks.data import table
from benchmarks.demo import SCORES, manifest_hash
from benchmarks.memory import sampling_table
from benchmarks.memory import table as memory_table
from benchmarks.rows import Row, summary
from vdm.config import load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def saved(name: str) -> dict[str, object]:
    record: dict[str, object] = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    return record


def test_the_table_of_parity_is_the_saved_one() -> None:
    rows = saved("parity-cpu.json")["rows"]
    assert isinstance(rows, list) and len(rows) == 20
    for row in rows:
        assert f"| {row['what']} | {row['against']} | {row['error']:.1e} | {row['detail']} |" in README, row["what"]
        assert row["error"] <= row["bound"]


def test_the_tables_of_the_data_loader_are_the_saved_ones() -> None:
    record = saved("data-cpu.json")
    lines = table(record).splitlines()
    assert len(lines) == 17
    assert [line for line in lines if line not in README] == []
    ways = record["ways"]
    assert isinstance(ways, dict)
    ours, rivals = ways["loader"]["rate"], ("cv2 loop", "PyAV loop", "decord", "torchcodec")
    assert ways["loader, all augmentation"]["of_raw"] >= 0.8, "what we set out for"
    assert ours >= max(ways[name]["rate"] for name in rivals)


def test_the_table_of_memory_is_the_saved_one() -> None:
    record = saved("memory-cpu.json")
    full, small = record["full_size"], record["small"]
    assert isinstance(full, dict) and isinstance(small, dict)
    lines = list(memory_table(full, small))
    assert len(lines) == 5
    assert [line for line in lines if line not in README] == []
    assert full["cheap"]["16"]["kept"] < 5.0e9, "what we set out for"
    assert all(row["gradient_error"] <= 1e-6 for row in small.values())


def test_the_table_of_plans_is_the_saved_one() -> None:
    for name in ("a100", "24gb", "12gb-lora"):
        plan = saved(f"plan-{name}.json")
        memory, gpus, disk, trained = (plan[key] for key in ("memory", "gpus", "disk", "trained"))
        assert isinstance(memory, dict) and isinstance(gpus, dict) and isinstance(disk, dict)
        assert isinstance(trained, dict)
        peaks = [f"{sum(memory[phase].values()) / 2**30:.1f}" for phase in ("training step", "validation", "preview")]
        learn = f"{sum(trained.values()) / 1e6:,.1f} M"
        step, saved_gb = gpus["A100"]["seconds_per_step"], disk["checkpoint"] / 1e9
        assert f"| `{name}.yaml` | {learn} | {' | '.join(peaks)} | {step:.2f} s | {saved_gb:.1f} GB |" in README


def test_the_tables_of_a_gpu_are_the_saved_ones() -> None:
    tables = []
    for name in ("attn-h200.json", "fused-h200.json"):
        rows = saved(name)["rows"]
        assert isinstance(rows, list)
        tables.append(summary([Row(**row) for row in rows]))
    for name in ("train-step-replayed-h200.json", "train-step-eager-h200.json"):
        rows = saved(name)["rows"]
        assert isinstance(rows, list)
        tables.append(train_step.table([train_step.Row(**row) for row in rows]))
    lines = [line for lines in tables for line in "\n".join(lines).splitlines()]
    assert len(lines) == 11 + 11 + 5 + 8
    assert [line for line in lines if line not in PERFORMANCE] == []


def test_the_page_of_performance_says_what_the_saved_outputs_say() -> None:
    lines = [line for line in PERFORMANCE.splitlines() if line.endswith("-cpu.json` |")]
    assert len(lines) == 10
    for line in lines:
        what, ratio, file = line.strip("| ").split(" | ")
        rows = saved(file.strip("`"))["rows"]
        assert isinstance(rows, list)
        which = what.split(": ")[-1].split(", ")[-1]
        names = {which, "both"} if which == "forward and backward" else {which}
        theirs = [r for r in rows if r["name"] == "diffusers" and (r.get("which") or r.get("part")) in names]
        assert f"{theirs[0]['ours_is_faster']:.2f}" == ratio, line


def test_the_table_of_memory_for_sampling_is_the_saved_one() -> None:
    rows = saved("memory-sampling.json")["rows"]
    assert isinstance(rows, list) and len(rows) == 4
    assert [line for line in sampling_table(rows) if line not in PERFORMANCE] == []
    assert all(max(row["denoising"], row["decoding"]) < 10e9 for row in rows), "12 GB, less context and workspaces"


def test_twenty_steps_of_dpmpp_follow_the_prompt_as_fifty_of_ddim_do() -> None:
    fifty, twenty = saved("demo-cpu.json"), saved("demo-dpmpp-20-cpu.json")
    assert fifty["manifest_sha256"] == twenty["manifest_sha256"], "of the same weights"
    for record, what in ((fifty, "DDIM, 50 steps"), (twenty, "DPM-Solver++(2M), 20 steps")):
        scores = record["scores"]
        assert isinstance(scores, dict)
        shares = " | ".join(f"{scores[name]['right']} of {scores[name]['clips']}" for name in ("action", "direction"))
        assert f"| {what} | {shares} |" in PERFORMANCE


def test_what_is_said_of_the_demo_model_was_measured_on_the_shipped_weights() -> None:
    shipped = manifest_hash(ROOT / "vdm" / "assets" / "demo")
    for name in ("cpu", "dpmpp-20-cpu", "reconstructed-cpu", "table-cpu", "plain-10-cpu", "pag-10-cpu"):
        assert saved(f"demo-{name}.json")["manifest_sha256"] == shipped, name


def test_the_toy_fvd_of_the_demo_model_is_the_saved_one() -> None:
    fifty, twenty = (saved(f"demo-{name}.json")["scores"]["fvd_toy"] for name in ("cpu", "dpmpp-20-cpu"))  # type: ignore[call-overload, index]
    assert f"{fifty['value']:.1f}, where 480 others have {fifty['floor']:.1f}" in README
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert f"is {fifty['value']:.1f}, after 20 steps of\nDPM-Solver++ {twenty['value']:.1f}" in page


def test_the_actions_one_by_one_are_the_saved_ones() -> None:
    page, scores = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8"), saved("demo-cpu.json")["scores"]
    assert isinstance(scores, dict) and len(scores["actions"]) == 16
    for name, row in scores["actions"].items():
        low, high = (f"{100 * x:.0f}" for x in row["ci95"])
        assert f"| {name} | {row['right']} of {row['clips']} | [{low}, {high}] |" in page


def test_the_first_snippet_says_what_the_demo_model_makes() -> None:
    sampling = load(ROOT / "vdm" / "assets" / "demo" / "config.yaml").sampling
    assert f"# (1, {sampling.num_frames}, {sampling.height}, {sampling.width}, 3), floats in [0, 1]" in README


def test_the_table_of_the_demo_model_is_the_saved_one() -> None:
    scores = saved("demo-cpu.json")["scores"]
    assert isinstance(scores, dict)
    for name in SCORES:
        row = scores[name]
        share, low, high, chance = (f"{100 * x:.0f}" for x in (row["value"], *row["ci95"], row["chance"]))
        assert f"| {row['right']} of {row['clips']}, {share} % [{low}, {high}] | {chance} % |" in README, name
    counts = " | ".join("{right} of {clips}".format(**scores[name]) for name in ("action", "colour", "shape", "joint"))
    assert f"| {counts} |\n" in (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")


def test_where_the_demo_model_falls_short_is_what_was_saved() -> None:
    scores, lost = saved("demo-cpu.json")["scores"], saved("demo-reconstructed-cpu.json")["scores"]
    assert isinstance(scores, dict) and isinstance(lost, dict)
    shown = {name: row["right"] for name, row in scores["actions"].items()}
    worst, unseen = (
        min(shown, key=lambda name: shown[name]),
        sum(row.get("none", 0) for row in scores["confusion"].values()),
    )
    others = [count for name, count in shown.items() if name != worst]
    assert worst == "turn_upside_down"
    wrong = scores["action"]["clips"] - scores["action"]["right"]
    assert f"({shown[worst]} of 30), of all others it shows {min(others)} to {max(others)} of 30" in README
    assert f"{unseen} of its {wrong} errors are clips in which no action" in README
    assert f"real clips keep {lost['shape']['right']} of {lost['shape']['clips']} shapes" in README


def test_the_ceiling_of_real_clips_is_the_saved_one() -> None:
    scores = saved("demo-real-cpu.json")["scores"]
    assert isinstance(scores, dict)
    action, direction, colour, shape = (scores[name] for name in SCORES[:4])
    said = (
        f"actions {action['right']} of {action['clips']}, directions\n{direction['right']} of {direction['clips']}, "
        f"colours {colour['right']} and shapes {shape['right']} of {shape['clips']}"
    )
    assert said in README
    counts = " | ".join(f"{row['right']} of {row['clips']}" for row in (action, colour, shape))
    assert f"| real, 480 of them | | {counts} |" in (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")


def test_the_table_of_steps_and_samplers_is_the_saved_one() -> None:
    rows = saved("demo-table-cpu.json")["rows"]
    assert isinstance(rows, list) and len(rows) == len(list(demo_table.settings()))
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert [line for line in demo_table.table(rows) if line not in page] == []


def test_the_table_of_perturbed_attention_is_the_saved_one() -> None:
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    plain, perturbed = saved("demo-plain-10-cpu.json"), saved("demo-pag-10-cpu.json")
    assert plain["manifest_sha256"] == perturbed["manifest_sha256"], "of the same weights"
    for record, what in ((plain, "by the text"), (perturbed, "and by perturbed attention, 0.5")):
        scores = record["scores"]
        assert isinstance(scores, dict)
        assert f"| {what} | {' | '.join('{right} of {clips}'.format(**scores[name]) for name in SCORES)} |" in page


def test_another_seed_is_within_the_interval_of_the_first() -> None:
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    first, other = (saved(f"demo-quarter-seed{seed}-cpu.json")["scores"] for seed in (0, 1))
    for seed, scores in enumerate((first, other)):
        assert isinstance(scores, dict)
        counts = " | ".join("{right} of {clips}".format(**scores[name]) for name in SCORES)
        assert f"| {seed} | {counts} | {scores['fvd_toy']['value']:.1f} |" in page
    assert isinstance(first, dict) and isinstance(other, dict)
    for name in SCORES:
        low, high = first[name]["ci95"]
        assert low <= other[name]["value"] <= high, name


def test_the_table_of_where_clips_are_spoilt_is_the_saved_one() -> None:
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    before, after = (saved(f"demo-stages-{name}.json")["rows"] for name in ("former-cpu", "cpu"))
    assert isinstance(before, list) and isinstance(after, list) and len(before) == len(after) > 0
    for pair in zip(before, after, strict=True):
        cells = [f"{pair[0]['level']:g}"]
        for row in pair:
            counts = ["{right} of {clips}".format(**row[name]) for name in ("action", "shape", "joint")]
            cells += [f"{row['latent_mse']:.4f}", *counts]
        assert f"| {' | '.join(cells)} |" in page


def test_the_table_of_the_evaluation_is_the_saved_one() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "evaluate-demo-cpu.json").read_text(encoding="utf-8"))
    records = {record["metric"]: record for record in content}
    shown = ("frame_ssim", "ms_flow", "warping_error", "action_accuracy", "direction_accuracy", "colour_accuracy")
    for name in (*shown, "shape_accuracy", "fvd_toy", "is_toy"):
        record, low, high = records[name], *records[name]["ci95"]
        real = record["ceilings"].get("reference", record["floor"])
        cells = (record["value"], real, record["ceilings"]["frozen"], record["ceilings"]["shuffled"])
        value, real, frozen, shuffled = (f"{x:.4g}" for x in cells)
        assert f"| `{name}` | {value} | {low:.4g} to {high:.4g} | {real} | {frozen} | {shuffled} |" in README, name


def test_what_the_autoencoder_leaves_is_the_saved_one() -> None:
    scores = saved("demo-reconstructed-cpu.json")["scores"]
    assert isinstance(scores, dict)
    lost, counts = scores["lost"], [f"{scores[name]['right']} of 160" for name in ("action", "colour", "shape")]
    cells = [f"{lost['psnr']:.2f} dB", *counts, f"{lost['warping_error_after']:.6f}"]
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert (
        f"| these after the autoencoder | {' | '.join(cells)} |" in page and f"| {lost['warping_error']:.6f} |" in page
    )
    assert lost["psnr"] > 30 and lost["warping_error_after"] < 1.1 * lost["warping_error"], "what we set out for"


def test_the_distances_to_what_was_trained_on_are_the_saved_ones() -> None:
    record, page = saved("demo-look-cpu.json"), (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    for name, shown in (("samples", "samples"), ("held out", "held-out clips")):
        row = record[name]
        assert isinstance(row, dict)
        assert f"| {row['clips']} {shown} | {row['nearest']:.4f} | {row['median']:.4f} |" in page
    assert record["nearer than any held out"] == 0


def test_the_table_of_the_judge_of_actions_is_the_saved_one() -> None:
    record = saved("actions-cpu.json")
    assert [line for line in actions_table(record) if line not in METRICS] == []
    sizes = record["sizes"]
    assert isinstance(sizes, dict)
    for size, least in (("64", 0.97), ("128", 0.99)):
        one = sizes[size]
        assert one["real"]["action"]["value"] >= least and one["real"]["action"]["clips"] == 500
        assert one["without_motion"]["frozen"]["action"]["value"] < 0.15
        assert one["without_motion"]["shuffled"]["action"]["value"] < 0.45
        assert min(row["value"] for row in one["metamorphic"].values()) >= 0.97
