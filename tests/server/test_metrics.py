"""What an answer's selections leave in the metrics."""

from guiderail.guides.scoring.selection_report import SelectionReport
from guiderail.server.metrics import Metrics


def test_the_kl_of_an_answer_counts_where_it_is_known() -> None:
    metrics = Metrics("fake")
    for kl in (0.25, None, 4.0):
        report = SelectionReport()
        report.moved(kl)
        metrics.selected("best_of_n", report)
    value = metrics.registry.get_sample_value
    labels = {"model_name": "fake", "guide": "best_of_n"}
    assert value("guiderail:selection_kl_nats_count", labels) == 2
    assert value("guiderail:selection_kl_nats_sum", labels) == 4.25
    assert value("guiderail:selection_warnings_total", labels) == 1, "the long way alone"
