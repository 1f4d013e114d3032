"""Benchmarks of finished runs, by their names on the command line of ``python -m umm_zoo.evaluate``."""

#: Dotted path of each class; one's own is named by its path.
BENCHMARKS: dict[str, str] = {
    "caption-duel": "umm_zoo.benchmarks.judging.caption_duel.CaptionDuel",
    "dpg": "umm_zoo.benchmarks.judging.dpg.DPGBench",
    "gedit": "umm_zoo.benchmarks.judging.gedit.GEdit",
    "geneval": "umm_zoo.benchmarks.geneval.GenEval",
    "geneval++": "umm_zoo.benchmarks.judging.geneval_pp.GenEvalPlusPlus",
    "imgedit": "umm_zoo.benchmarks.judging.imgedit.ImgEdit",
    "mini-geneval": "umm_zoo.benchmarks.geneval.MiniGenEval",
    "mmvp": "umm_zoo.benchmarks.mmvp.MMVP",
    "pope": "umm_zoo.benchmarks.pope.POPE",
    "unified-bench": "umm_zoo.benchmarks.unified_bench.UnifiedBench",
    "wise": "umm_zoo.benchmarks.judging.wise.Wise",
    "wise-legacy": "umm_zoo.benchmarks.judging.wise.WiseLegacy",
}
