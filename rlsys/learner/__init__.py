"""The learner: DeepSpeed engines for policy and critic, one rank per process; no Ray in here.

`LearnerRank` turns scored groups into optimizer updates; `Learner` holds the engines; a step that would apply a gradient
that is not finite applies nothing on any rank.
"""
