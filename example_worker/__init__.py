"""A shop that prices carts: the example application of celery_mlcache, its demo and its container fleet.

====================  =================================================================================
``catalogue.csv``     the shop's articles; written once by ``make_catalogue.py``
``shop.py``           the domain: a SQLite database of record and slow pricing rules; knows no cache
``carts.py``          what customers put into their carts: the same few articles, mostly
``celeryconfig.py``   Celery's settings, all from the environment
``app.py``            the Celery application and its cache (``celery -A example_worker.app worker``)
``tasks.py``          cached tasks, plain tasks that use the cache, and the task that changes a price
``demo.py``           ``make demo``: two worker nodes and a caller on one machine, every claim checked
``caller.py``         the caller of ``docker-compose.yml``
====================  =================================================================================
"""
