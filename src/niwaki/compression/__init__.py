"""Compression: from a recipe and a checkpoint to a result folder and its record, and the tools for a result.

The walk and the job name no method; the registry gives them their steps. `plan` predicts a job. `inspect`, `why` and
`verify` read a result. `recover` trains its kept weights. `adapt` fits the predictor of a contextual result again.
"""
