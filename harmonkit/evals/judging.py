"""Questions to a judge whose replies must be read: asked again where a reply says nothing."""

TRIES = 3


def ask_until_read(judge, questions, read) -> list:
    """What `read` makes of the judge's replies to (text, image) pairs; None where it never says anything.

    read(reply) -> anything but None, or None to ask again; three times in all. A request that fails is not
    asked again: the Judge has retried it.
    """
    questions = list(questions)
    answers = [None] * len(questions)
    unread = range(len(questions))
    for attempt in range(TRIES):
        if not unread:
            break
        replies = judge.ask_all([questions[i] for i in unread], attempt=attempt)
        answered = [(i, reply) for i, reply in zip(unread, replies, strict=True) if reply is not None]
        for i, reply in answered:
            answers[i] = read(reply)
        unread = [i for i, _ in answered if answers[i] is None]
    return answers
