"""A text is the same for every draft length."""

DRAFTS = (0, 1, 4)


def alike(engine, prompts, params, drafts=DRAFTS, **options):
    """The results, the same for every draft length."""
    plain, *others = ([*engine.generate(prompts, params, num_draft_tokens=k, **options)] for k in drafts)
    for some in others:
        assert [(each.tokens, each.finish_reason) for each in some] == [
            (each.tokens, each.finish_reason) for each in plain
        ]
    return plain
