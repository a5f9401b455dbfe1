"""What report.html says of a run: the question, the answer, the captions, the tables and the people's texts."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from crowd_fine_tuning_sim.cases import COMBINATION, Played, user_names
from crowd_fine_tuning_sim.estimates import ESTIMATES
from crowd_fine_tuning_sim.plays import REPORTED
from crowd_fine_tuning_sim.reliability import needed
from crowd_fine_tuning_sim.results import CORRELATIONS, Tables
from crowd_fine_tuning_sim.settings import Settings
from experiment.report import Compared, Illustration, Page, Sample, Table, Value, estimate_of, words
from point_in_space_sim.target import distances_to

TEXTS_SHOWN = 5
COMPARED = {"pearson": 1, "spearman": 1, "misallocation": -1}  # 1: more is better
FIGURES = (
    Illustration(
        "agreement",
        "Points and estimates against retraining",
        "Each person's points, by scoring, and each estimate of their share, against the Shapley value of the game in "
        "which the model is retrained on coalitions of people; standard deviations within a crowd's repetition. Bars: "
        "one standard error of the Shapley value. On the dotted diagonal both agree.",
        "Scatter plots of points and of estimates against Shapley values by retraining, one mark a person.",
    ),
    Illustration(
        "coalitions",
        "What coalitions are worth",
        "Each coalition's value by retraining against its value in the game of mean text vectors, which needs no "
        "model; darker marks are smaller coalitions.",
        "Scatter plot of the retrained value of each coalition against its static value.",
    ),
    Illustration(
        "progress",
        "Distance by round",
        "Distance of the model to the centroid before the first round and after each: of the mean of fresh samples "
        "(language models), and of the model's vector in experiment 2's world with the same people and rounds. A "
        "sample's mean lies farther away than that of all that its model could write.",
        "Lines of the distance to the centroid over the rounds, for language models and for vectors.",
    ),
    Illustration(
        "people",
        "The people of the first crowd",
        "Each person's mean text vector, by the number under which they are listed with their kind and their Shapley "
        "value by retraining, beside the centroid and what the models write, in the plane in which they differ most.",
        "A plane with the people's mean vectors, the centroid and the models.",
    ),
)
FILES = (
    ("summary.csv", "the answer, means over crowds with intervals"),
    ("points.csv", "what each person earned and is paid, and their Shapley values"),
    ("ledger.csv", "the coordinator's record, from which points and pay follow"),
    ("estimates.csv", "other estimates of their shares"),
    ("agreement.csv", "correlations with the reference, and models tuned"),
    ("reliability.csv", "whether people can be told apart: by samples, texts and seeds"),
    ("coalitions.csv", "every retrained coalition's value; a digit a person, in the order of users.csv (read as text)"),
    ("rounds.csv", "every candidate of every round"),
    ("progress.csv", "distance by round, language models and vectors"),
    ("finals.csv", "fresh samples of the last models and of what they are compared with: value, distinct, copied"),
    ("users.csv", "the people"),
    ("run.json", "settings, versions, hashes, times"),
)
OTHERS = {
    "everybody": "one model on everybody's texts",
    "best_person": "the model of the best single person",
    "best_coalition": "that of the best retrained coalition (the oracle)",
    "base": "the untuned model",
}


def report_page(
    settings: Settings, tables: Tables, drawn: Sequence[str], played: Sequence[Played], written: Iterable[str]
) -> Page:
    """From the run's tables. drawn: its figures' names. written: the run's files."""
    seeds = f"{settings.num_seeds} seed{'s' * (settings.num_seeds > 1)}"
    crowds = len(settings.target_emotion) * settings.num_crowds
    reference = {
        "exact": f"all 2^{settings.num_users} coalitions are retrained",
        "sampled": f"{settings.retrainings} coalitions are retrained, with the static game as control variate",
        "none": "no coalition is retrained",
    }[settings.reference]
    return Page(
        experiment="crowd_fine_tuning_sim",
        title="Crowd fine-tuning",
        question="People who hold texts tune a language model in competing groups, earn points and are paid by them. "
        "Do points and pay agree with what each person is worth when the model is retrained on coalitions of people, "
        "and does the model come nearer to its aim than one tuned on everybody's texts?",
        answer=[*answer(tables["summary"]), *apart(tables["reliability"])],
        setting=[
            f"{crowds} crowd{'s' * (crowds > 1)} of {settings.num_users} people with {settings.texts_per_user} texts "
            f"each ({settings.crowd}), {seeds}; targets: {', '.join(settings.target_emotion)}. The model is to write "
            f"like the {settings.neighbours} texts nearest to the target that nobody of the crowd holds; a sample of "
            f"{settings.samples} texts is valued by the metric of its mean vector; what is compared at the end by "
            f"{REPORTED * settings.samples} fresh ones.",
            f"Each of {settings.num_rounds} rounds tunes a variant for each of {settings.num_groups} groups on "
            f"{settings.budget} texts of its members, by weight; the best one becomes the model if it beats the "
            f"model's own fresh sample (plus selection). Reference: {reference}.",
        ],
        figures=[figure for figure in FIGURES if figure.name in drawn],
        tables=[
            agreement(tables["summary"]),
            ends(tables["summary"]),
            *([telling_apart(tables["reliability"])] if len(tables["reliability"]) else []),
            people(tables),
        ],
        samples=samples_of(settings, played),
        samples_note=f"The first {TEXTS_SHOWN} texts of each person of the first crowd, and what its last models "
        "wrote, with their distance to the centroid. They are what people and a language model wrote.",
        files=[(file, what) for name, what in FILES for file in (name, f"{name}.gz") if file in (*written, "run.json")],
        compared=Compared("agreement", COMBINATION, ["target", "crowd"], COMPARED, where={"what": "points"}),
    )


def row_of(summary: pd.DataFrame, what: str, quantity: str, scoring: str = "") -> pd.Series | None:
    """Of the first metric and, of several groupings, the first."""
    own = summary[(summary["what"] == what) & (summary["quantity"] == quantity) & (summary["scoring"] == scoring)]
    return own.iloc[0] if len(own) else None


def answer(summary: pd.DataFrame) -> list[str]:
    metric, crowds = summary["metric"].iloc[0], int(summary["crowds"].max())
    over = f"means over {crowds} crowds, 95 % intervals" if crowds > 1 else "one crowd, so without intervals"
    scorings = [name for name in dict.fromkeys(summary["scoring"]) if name]
    first_of = summary["grouping"][summary["grouping"] != ""]
    over += f", grouping {first_of.iloc[0]}" if first_of.nunique() > 1 else ""
    titles = {name: ("points", name) for name in scorings} | {
        title: (name, "") for name, (_, title, _) in ESTIMATES.items()
    }
    agreed = {
        title: f"{title} {words(estimate_of(row))}" + (f" ({row['crowds']} crowds)" if row["crowds"] < crowds else "")
        for title, (what, scoring) in titles.items()
        if (row := row_of(summary, what, "pearson", scoring)) is not None and np.isfinite(row["value"])
    }
    points = ", ".join(agreed[name] for name in scorings if name in agreed)
    others = ", ".join(said for title, said in agreed.items() if title not in scorings)
    lines = [f"Points agree with Shapley values by retraining ({metric}) at r = {points} ({over})."] if points else []
    lines += [f"Other estimates agree at r = {others}."] if others else []
    lines += misallocations(summary, scorings)
    scoring = scorings[-1]
    for other, title in OTHERS.items():
        row = row_of(summary, "points", f"value - {other}", scoring)
        if row is not None:
            line = f"The competition's last model ({scoring}) less {title}: {words(estimate_of(row), 3)}"
            for share in ("distinct", "copied"):
                if (differs := row_of(summary, "points", f"{share} - {other}", scoring)) is not None:
                    line += f"; of the share of {share} texts {words(estimate_of(differs))}"
            lines.append(f"{line}.")
    if (copied := row_of(summary, "points", "copied", scoring)) is not None:
        share = words(estimate_of(copied))
        lines.append(f"Of what it writes a share of {share} is copied: texts that somebody of the crowd holds.")
    return lines


def misallocations(summary: pd.DataFrame, scorings: Sequence[str]) -> list[str]:
    """Of the first metric, where pay and reference are known."""
    shares = []
    for name in scorings:
        row, less = (
            row_of(summary, "points", quantity, name) for quantity in ("misallocation", "misallocation - equal")
        )
        if row is not None and less is not None and np.isfinite(row["value"]):
            shares.append(f"{name} {words(estimate_of(row))} ({words(estimate_of(less))} against equal pay)")
    said = f"Share of the budget that pay gives the wrong people, by Shapley values: {', '.join(shares)}."
    return [said] if shares else []


def told_apart(table: pd.DataFrame) -> list[tuple[str, str, int, float, float, float]]:
    """(metric, source, at, predicted, observed, needed), means over crowds; needed follows from the mean."""
    rows = []
    for key, own in table.groupby(["metric", "source"], sort=False):
        metric, source = map(str, key)
        at, predicted, observed = int(own["at"].iloc[0]), own["predicted"].mean(), own["observed"].mean()
        rows.append((metric, source, at, predicted, observed, needed(at, observed if source == "seeds" else predicted)))
    return rows


UNITS = {"samples": "sampled texts a model", "texts": "texts a person", "seeds": "seeds"}


def apart(table: pd.DataFrame) -> list[str]:
    """Of the first metric: a line a source."""
    lines = []
    for metric, source, at, predicted, observed, number in told_apart(table):
        if metric != table["metric"].iloc[0]:
            continue
        if source == "seeds":
            line = f"Between two seeds people's Shapley values correlate at r = {observed:.2f}"
            if np.isfinite(predicted):
                line += f", where the judge's noise alone would leave {predicted:.2f}"
            if observed > 0:
                line += f"; perfect estimates would agree with one seed's at {observed**0.5:.2f}"
        else:
            game = "retraining" if source == "samples" else "the game of mean text vectors"
            line = f"Between random halves ({at} {UNITS[source]}) people's Shapley values by {game} correlate at "
            line += f"r = {observed:.2f}, the reliability by the formula is {predicted:.2f}"
        enough = f"it takes {max(number, 1):.0f} {UNITS[source]}" if np.isfinite(number) else "no number is known"
        lines.append(f"{line}; for 0.9 {enough}.")
    return lines


def telling_apart(table: pd.DataFrame) -> Table:
    rows: list[list[Value]] = [
        [f"{at} {UNITS[source]}", metric, predicted, observed, number]
        for metric, source, at, predicted, observed, number in told_apart(table)
    ]
    caption = (
        "Reliability of people's Shapley values, by the formula and as the mean correlation of two such sets of values "
        "(of seeds: the formula knows the judge's noise, not tuning's); needed: how many give 0.9. Means over crowds."
    )
    return Table(
        "Telling people apart", caption, ["with", "metric", "formula", "observed", "needed"], rows, "reliability.csv"
    )


def agreement(summary: pd.DataFrame) -> Table:
    rows: list[list[Value]] = []
    for key, own in summary.groupby(["metric", "what", "grouping", "scoring"], sort=False):
        metric, what, grouping, scoring = map(str, key)
        by = own.set_index("quantity")
        title = f"{scoring} points, {grouping}" if what == "points" else ESTIMATES[what][1]
        models = float(by.loc["models", "value"])
        measures = [estimate_of(by.loc[name]) for name in (*CORRELATIONS, "misallocation")]
        if what != "points" and not any(np.isfinite(measure.value) for measure in measures):
            continue
        rows.append([title, metric, *measures, int(models) if models.is_integer() else models])
    caption = (
        "Correlation with the retraining game's Shapley values over the people of a crowd, means over crowds with 95 % "
        "intervals (of correlations uneven, see experiment/statistics.py); within kinds: among people of one kind, who "
        "are alike but for chance; misallocated: the share of the budget that "
        "goes to others than these values say, of pay or of the positive part of an estimate; models: how many had to "
        "be tuned for points or estimate. Pay by attributed points takes one more model a person, and everybody's."
    )
    columns = ["what", "metric", "Pearson", "Spearman", "within kinds", "misallocated", "models"]
    return Table("Agreement", caption, columns, rows, "summary.csv")


def ends(summary: pd.DataFrame) -> Table:
    rows: list[list[Value]] = []
    of_points = summary[summary["what"] == "points"]
    for (metric, grouping, scoring), own in of_points.groupby(["metric", "grouping", "scoring"], sort=False):
        by = own.set_index("quantity")
        for other in [name.removeprefix("value - ") for name in by.index if name.startswith("value - ")]:
            measures = [estimate_of(by.loc[f"{measure} - {other}"]) for measure in ("value", "distinct", "copied")]
            rows.append([f"{scoring}, {grouping}", str(metric), OTHERS.get(other, other), *measures])
    caption = (
        "Value of a fresh sample of the competition's last model less that of another's: above 0 it is nearer. Beside "
        "it, the same of the shares of distinct texts and of those that somebody of the crowd holds word for word: a "
        "model that recites a few texts is near, too."
    )
    columns = ["competition", "metric", "less", "value", "distinct", "copied"]
    return Table("Where it ends", caption, columns, rows, "summary.csv")


def people(tables: Tables) -> Table:
    points, users = tables["points"], tables["users"]
    keys = ["target", "crowd", "user"]
    metric = points["metric"].iloc[0]
    own = points[points["metric"] == metric]
    of_seeds = own.drop_duplicates([*keys, "seed"]).groupby(keys, sort=False)
    values = of_seeds[["shapley", "standard_error", "static_shapley"]].mean()
    values["standard_error"] = of_seeds["standard_error"].agg(lambda errors: np.sqrt((errors**2).sum()) / len(errors))
    earned = own.pivot_table("points", keys, "scoring", sort=False)
    rows: list[list[Value]] = []
    for user in users.to_dict("records"):
        key = (user["target"], user["crowd"], user["user"])
        value = values.loc[key]
        rows.append(
            [
                str(user["user"]),
                str(user["target"]),
                int(user["crowd"]),
                str(user["kind"]),
                int(user["near_duplicates"]),
                float(user["distance"]),
                float(value["shapley"]),
                float(value["standard_error"]),
                float(value["static_shapley"]),
                *(float(earned.loc[key, name]) for name in earned.columns),
            ]
        )
    columns = [
        "person",
        "target",
        "crowd",
        "kind",
        "near-duplicates",
        "distance",
        "Shapley",
        "standard error",
        "static",
    ]
    caption = f"Means over seeds and groupings, metric {metric}; on the right the points of each scoring."
    return Table("People", caption, [*columns, *map(str, earned.columns)], rows, "points.csv")


def shown(centroid: np.ndarray, vectors: np.ndarray, texts: Sequence[str]) -> list[tuple[float, str]]:
    return list(zip(map(float, distances_to(centroid, vectors)), texts, strict=True))[:TEXTS_SHOWN]


def samples_of(settings: Settings, played: Sequence[Played]) -> dict[str, list[Sample]]:
    first = played[0]
    crowd = first.case.crowd
    people_of = [
        Sample(f"{name} ({person.kind})", shown(crowd.centroid, vectors, person.texts))
        for name, person, vectors in zip(user_names(settings, crowd), crowd.people, crowd.vectors, strict=True)
    ]
    models = [
        Sample(
            f"{scoring} points, {grouping}, {metric}",
            shown(crowd.centroid, own["final"], [str(text) for text in own["texts"]]),
        )
        for (grouping, metric, scoring), own in first.competitions.items()
    ]
    return {f"{crowd.target}, crowd {first.case.number}: the people": people_of, "Last models": models}
