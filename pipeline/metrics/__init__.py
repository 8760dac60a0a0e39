"""Pure scores of answers against references, aggregates with confidence intervals, and the scoring of result rows.

    text  vqa  choice  overlap  cider     (prediction, references) -> float
    interval                              streamed means, bootstrap intervals, paired comparison
    registry                              the metrics by name: titles, scales, how rows add up
    scoring                               record batches of result rows -> scores of rows, metrics of the run

Knows no run folder, model or page; whoever calls opens the files.
"""
