"""What a pipeline schedule costs, before anything runs: python pipeline_picture.py"""

from pypar.pipeline_parallel import StageCost, schedules, simulate
from pypar.pipeline_parallel.picture import picture_of

schedule = schedules.build("one_f_one_b", 4, 8)  # 4 ranks, 8 microbatches
print(picture_of(schedule))

uneven = [StageCost(1.0, 1.0, 1.0)] * 3 + [StageCost(1.5, 1.5, 1.5)]  # the last stage has the head, too
step = simulate(schedule, uneven, communication=0.1)
print(f"span {step.span:.1f}, bubble {step.span_bubble:.1%}, peak in flight {step.peak_in_flight}")
